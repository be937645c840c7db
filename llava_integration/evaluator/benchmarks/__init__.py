"""Scoring MLLM answers: benchmarks in ``rules/``, the commands ``score`` and ``bench-mllm`` in
``bench``."""
