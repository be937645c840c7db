"""Tests with real servers, in an environment of their own: ``scripts/test.sh --servers``."""

import sys
from importlib.util import find_spec
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(TESTS), *(str(TESTS / name) for name in ("llava/serve", "serving"))]

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
