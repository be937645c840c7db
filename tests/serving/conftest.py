"""The checkpoints of tests/llava/serve, which need no LLaVA."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "llava" / "serve"))
