"""Tests with packages that people train and evaluate with, each in its environment:
``scripts/test.sh --stacks``."""

from importlib.util import find_spec

NEEDS = {  # one of them
    "test_logs.py": ("lmms_eval",),
    "test_trainers.py": ("swift", "llamafactory", "trl"),
    "test_forks.py": ("llavaction",),
    "test_embedders.py": ("mteb",),
}
collect_ignore = [
    name for name, packages in NEEDS.items() if not any(map(find_spec, packages))
]
