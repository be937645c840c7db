"""Scoring MLLM answers: one file a benchmark in ``rules/``, the commands ``score`` and ``bench-mllm``."""
