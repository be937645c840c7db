"""Tests with the packages that people evaluate with, in an environment of their own: ``scripts/test.sh --stacks``."""

from importlib.util import find_spec

if find_spec("lmms_eval") is None:
    collect_ignore_glob = ["test_*.py"]
