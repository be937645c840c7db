"""The claims of a quickstart's results: for each, the value of every seed on either side."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.json_files import read_json_value as read_json

RAW_TUNED = ("raw", "tuned")
BEFORE_AFTER = ("before", "after")
# of LLaVA, by its folder
LANGUAGE_MODELS = {"llava": "2.5 million weights", "llava-smollm2": "SmolLM2-135M"}
# teacher of the tower -> its side in llava-controls
CONTROLS = {"random": "before", "raw": "after"}
LEVEL = 0.05  # of the tests, after Holm's adjustment
# of a claim in headline.json, kept with the values of its seeds
RECORDED_FIELDS = (
    "chance",
    "difference",
    "interval",
    "p_adjusted",
    "significant",
    "seeds_significant",
    "random",
    "map",
)


def measured(folder: Path) -> dict[str, Any]:
    """The claims of a quickstart's ``headline.json``. Raises FileNotFoundError without one."""
    results = read_json(folder / "headline.json")
    claims = {}
    for result in results["headline"] + results["others"]:
        claim: dict[str, Any] = {"headline": result in results["headline"]}
        for field in RECORDED_FIELDS:
            if field in result:
                claim[field] = result[field]
        for side in RAW_TUNED:
            claim[side] = [round(seed[side], 5) for seed in result["by_seed"].values()]
        claims[result["name"]] = claim
    return claims


def measured_llava(folder: Path) -> dict[str, Any]:
    """The claims of the LLaVA miniature in a quickstart's results, in percent or points; {} without
    one."""
    claims = {}
    for model_folder, model in LANGUAGE_MODELS.items():
        scores = folder / model_folder / "scores"
        for benchmark, row in _compared(folder / model_folder).items():
            claim = dict(row)
            for side in BEFORE_AFTER:
                claim[side] = _by_seed(scores / side, benchmark)
            claim["controls"] = _controls(folder, model_folder, benchmark)
            claims[f"{model}: {benchmark.removeprefix('miniature: ')}"] = claim
    return claims


def _controls(
    folder: Path, model_folder: str, benchmark: str
) -> dict[str, dict[str, Any]]:
    """Control -> its values, and ``after`` compared with it; without those that were not run."""
    controls = {}
    for control, side in CONTROLS.items():
        row = _compared(folder / f"{model_folder}-{control}").get(benchmark)
        if row:
            scores = folder / f"{model_folder}-controls" / "scores" / side
            controls[control] = {"values": _by_seed(scores, benchmark), **row}
    return controls


def with_controls(claims: Mapping[str, Any]) -> dict[str, Any]:
    """The claims, and each with a control in place of ``before``: the differences that tell about
    the teacher."""
    all_claims = dict(claims)
    for name, claim in claims.items():
        for control, row in claim["controls"].items():
            against_control = {**claim, **row, "before": row["values"]}
            all_claims[f"{name} against {control}"] = against_control
    return all_claims


def _compared(folder: Path) -> dict[str, dict[str, Any]]:
    """Benchmark -> what `llm2clip compare` found; {} where it was not run."""
    path = folder / "compare" / "compare.json"
    if not path.is_file():
        return {}
    compared = {}
    for row in read_json(path)["rows"]:
        compared[row["benchmark"]] = {
            "difference": row["difference"],
            "interval": row["interval"],
            "questions": row["questions"],
            "p_adjusted": row["p_holm"],
            "significant": row["p_holm"] < LEVEL,
        }
    return compared


def _by_seed(folder: Path, benchmark: str) -> list[float]:
    """What each training reached, seed 0 first: accuracy, or points above exchanged pictures."""

    def seed_order(path: Path) -> tuple[bool, int, Path]:
        """Seed 0 lies in the folder itself, the others in seed1, ..., seed10 below it."""
        return path.parent != folder, len(path.parent.name), path

    values = []
    for path in sorted(folder.rglob("*.scores.json"), key=seed_order):
        scores = ScoreFile.read(path)
        if scores.benchmark == benchmark:
            accuracy = scores.metrics.get("accuracy", math.nan)
            values.append(round(scores.metrics.get("above", accuracy), 2))
    return values


def part_of(name: str) -> str:
    """``tower``, ``teacher``, or LLaVA's language model."""
    return name.partition(":")[0]


def by_part(claims: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Part -> its claims."""
    of_part: dict[str, dict[str, Any]] = {}
    for name, claim in claims.items():
        of_part.setdefault(part_of(name), {})[name] = claim
    return of_part
