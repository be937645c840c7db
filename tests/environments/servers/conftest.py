"""Tests with real servers, in an environment of their own: ``scripts/test.sh --servers``."""

from importlib.util import find_spec

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
