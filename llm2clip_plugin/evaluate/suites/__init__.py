"""The field's retrieval benchmarks by name, read from files that users download themselves."""
