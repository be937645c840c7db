"""Where the golden predictions and the official scorers' numbers are."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1] / "golden" / "mllm"
MODELS = ("model-a", "model-b")
BENCHMARKS = (
    "vqav2",
    "gqa",
    "vizwiz",
    "scienceqa",
    "textvqa",
    "pope",
    "mme",
    "mmbench",
    "seedbench",
)


def answers(name: str, model: str) -> Path:
    """LLaVA's answers file of a benchmark and model."""
    paths = [
        path
        for pattern in (
            f"answers/{model}.jsonl",
            f"answers/*/{model}.jsonl",
            f"answers/**/{model}/merge.jsonl",
        )
        for path in (ROOT / name).glob(pattern)
    ]
    assert len(paths) == 1, paths
    return paths[0]


def expected(name: str) -> dict:
    """What the official scorer gave."""
    return json.loads((ROOT / name / "expected.json").read_text(encoding="utf-8"))
