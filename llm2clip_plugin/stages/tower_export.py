"""A training run's checkpoint as a tower directory."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import RunRecord
from llm2clip_plugin.data.remote import public_name
from llm2clip_plugin.json_files import from_plain
from llm2clip_plugin.run_folder import CHECKPOINTS
from llm2clip_plugin.stages.tower_config import DEFAULT, RunConfig
from llm2clip_plugin.train.checkpoint import RESUME_AUTO, Checkpoints, load
from llm2clip_plugin.train.model import build_dual
from llm2clip_plugin.vision.export import BEFORE, export_tower

# folders in a run's
TOWER = "tower"
TOWER_EMA = "tower-ema"


def export_run(
    run: Path,
    output: Path,
    checkpoint: str,
    averaged: bool,
    *,
    adapter: Path | None = None,
    replace: bool,
) -> None:
    """Write a run's checkpoint ("": the newest, or the name or path of one), or its average, as a
    tower directory."""
    record = RunRecord.read(run / RunRecord.FILE)
    config = from_plain(RunConfig, record.config, where=str(run / RunRecord.FILE))
    inside = run / CHECKPOINTS / checkpoint
    named = str(inside) if checkpoint and inside.is_dir() else checkpoint or RESUME_AUTO
    path = Checkpoints(run, keep=0).find(named, moments=False, option="--checkpoint")
    if path is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet")
    loaded = load(path, moments=False)
    if averaged and not loaded.averages:
        raise ValueError(f"{path} has no moving average: the run had --ema-decay 0")
    dual = build_dual(config.tower, config.dual, seed=config.train.seed)
    weights = dict(loaded.weights)
    if averaged:
        weights |= loaded.averages
    dual.load_state_dict(weights)
    training: dict[str, Any] = {
        "steps": loaded.state.step,
        "samples": loaded.state.samples,
        "global_batch": config.train.global_batch,
        "precision": config.train.precision,
        "recipe": recipe_of(record.command.get("words", [])),
        "data": [public_name(path) for path in config.data.path],
        "data_samples": record.epoch_samples,
        "config_hash": loaded.state.config_hash,
        "moving_average": averaged,
    }
    if loaded.state.before and not averaged:
        training[BEFORE] = loaded.state.before
    export_tower(
        dual,
        output,
        origin=config.tower.path or config.tower.architecture,
        teacher=record.teacher,
        training=training,
        metrics={} if averaged else loaded.state.metrics,
        adapter=adapter,
        replace=replace,
    )


def recipe_of(words: Sequence[str]) -> str:
    """The recipe that a command's ``words`` start from; "" if they name a configuration, or none is
    known."""
    lines = "\n".join(words)
    recipe = re.search(r"^--recipe[=\n](.+)$", lines, re.MULTILINE)
    if recipe:
        return recipe[1]
    if not words or re.search(r"^--config\b", lines, re.MULTILINE):
        return ""
    return DEFAULT


def export_towers(folder: Path, step: int, *, averaged: bool) -> None:
    """Export a run's checkpoint of the last step, and its moving average if it has one."""
    # by its name: no fallback to an older one
    last = Checkpoints(folder, keep=0).path(step).name
    export_run(folder, folder / TOWER, last, False, replace=True)
    if averaged:
        export_run(folder, folder / TOWER_EMA, last, True, replace=True)
