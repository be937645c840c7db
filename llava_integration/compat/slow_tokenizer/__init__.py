"""Tokenizers of transformers 4.37 on the classes of transformers 5; apart, because they import what 4.37 lacks."""
