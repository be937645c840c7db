"""Scoring MLLM answers: one file per benchmark in ``rules/``, the commands ``score`` and ``bench-mllm``."""
