"""Tests with real servers, in an environment of their own: ``scripts/test.sh --servers``."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
