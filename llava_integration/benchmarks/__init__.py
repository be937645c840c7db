"""Scoring rules, one file a benchmark; paired comparison of towers; the report."""
