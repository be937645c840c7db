"""The checkpoints of tests/llava/serve, which need no LLaVA."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "llava" / "serve"), str(Path(__file__).parent)]
