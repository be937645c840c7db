"""Faults of LLaVA's side have the form of ``tests/faults``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "faults"))
