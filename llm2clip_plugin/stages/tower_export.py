"""``llm2clip export``: a training run as a tower directory, or a tower directory in another format."""

import re
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import RunRecord, TowerCard
from llm2clip_plugin.files import CHECKPOINTS, ContractError, from_plain
from llm2clip_plugin.stages.tower_config import DEFAULT, EXPORT, RunConfig
from llm2clip_plugin.text.adapter import adapter_sha256
from llm2clip_plugin.train.checkpoint import RESUME_AUTO, Checkpoints, load
from llm2clip_plugin.train.model import build_dual
from llm2clip_plugin.vision.convert.importing import convert
from llm2clip_plugin.vision.directory import fetch_directory, located
from llm2clip_plugin.vision.export import BEFORE, check_repository, export_tower, push_to_hub, reexport, summary

TOWER, TOWER_EMA = "tower", "tower-ema"  # folders in a run's


def main(argv: list[str]) -> int:
    """``llm2clip export SOURCE --output DIR [--format clip|onnx] [--push OWNER/NAME]``."""
    options = EXPORT.parse(argv)
    check_repository(options.push)
    source, output, replace, adapter = Path(options.source), Path(options.output), options.overwrite, None
    is_run = (source / RunRecord.FILE).is_file()
    if options.format != "tower":
        if is_run or options.push:
            raise ValueError(
                f"--format {options.format} converts a tower directory, a run's is RUN/tower; leave out --push"
            )
        print(f"{convert(options.source, output, options.format, replace=replace)}: verified by reloading")
        return 0
    if is_run:
        export_run(source, output, options.checkpoint, options.ema, with_adapter=options.with_adapter, replace=replace)
    elif options.ema or options.checkpoint:
        raise ValueError(f"--ema and --checkpoint require a training run, but {source} has no {RunRecord.FILE}")
    else:
        if options.with_adapter:
            directory = fetch_directory(options.source)
            adapter = teacher_adapter(located(TowerCard.read(directory / TowerCard.FILE), directory).teacher)
        reexport(options.source, output, adapter=adapter, replace=replace)
    print(summary(output, TowerCard.read(output / TowerCard.FILE)))
    if options.push:
        print(push_to_hub(output, options.push, private=not options.public))
    return 0


def teacher_adapter(teacher: dict[str, Any]) -> Path:
    """The folder of a teacher's adapter, downloaded if it is on the Hub.

    Raises ValueError if the teacher has none, FileNotFoundError if it is gone, ContractError if it was changed.
    """
    if not teacher.get("adapter_sha256"):
        raise ValueError(f"--with-adapter: the teacher {teacher.get('llm', '')!r} has no adapter; leave the option out")
    folder = fetch_directory(str(teacher.get("adapter", "")))
    if (actual := adapter_sha256(folder)) != teacher["adapter_sha256"]:
        raise ContractError(
            f"--with-adapter: {folder} has SHA-256 {actual[:12]}, but the tower was trained with "
            f"{teacher['adapter_sha256'][:12]}; restore that adapter there"
        )
    return folder


def export_run(
    run: Path, output: Path, checkpoint: str, averaged: bool, *, with_adapter: bool = False, replace: bool
) -> None:
    """Write a run's checkpoint ("": the newest, or the name or path of one), or its average, as a tower directory."""
    record = RunRecord.read(run / RunRecord.FILE)
    adapter = teacher_adapter(record.teacher) if with_adapter else None
    config = from_plain(RunConfig, record.config, where=str(run / RunRecord.FILE))
    inside = run / CHECKPOINTS / checkpoint
    named = str(inside) if checkpoint and inside.is_dir() else checkpoint or RESUME_AUTO
    path = Checkpoints(run, keep=0).find(named, moments=False, option="--checkpoint")
    if path is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet")
    loaded = load(path, moments=False)
    if averaged and not loaded.averages:
        raise ValueError(f"{path} has no moving average: the run had --ema-decay 0")
    words = "\n".join(record.command.get("words", []))
    recipe = re.search(r"^--recipe[=\n](.+)$", words, re.MULTILINE)
    usual = "" if not words or re.search(r"^--config\b", words, re.MULTILINE) else DEFAULT
    dual = build_dual(config.tower, config.dual, seed=config.train.seed)
    dual.load_state_dict({**loaded.weights, **(loaded.averages if averaged else {})})
    export_tower(
        dual,
        output,
        origin=config.tower.path or config.tower.architecture,
        teacher=record.teacher,
        training={
            "steps": loaded.state.step,
            "samples": loaded.state.samples,
            "global_batch": config.train.global_batch,
            "precision": config.train.precision,
            "recipe": recipe[1] if recipe else usual,
            "data": [Path(path).name for path in config.data.path],
            "data_samples": record.epoch_samples,
            "config_hash": loaded.state.config_hash,
            "moving_average": averaged,
            **({BEFORE: loaded.state.before} if loaded.state.before and not averaged else {}),
        },
        metrics={} if averaged else loaded.state.metrics,
        adapter=adapter,
        replace=replace,
    )


def export_towers(config: RunConfig, step: int) -> None:
    """Export a run's checkpoint of the last step, and its moving average if there is one."""
    folder = Path(config.output_dir)
    last = Checkpoints(folder, keep=0).path(step).name  # by its name: no fallback to an older one
    export_run(folder, folder / TOWER, last, False, replace=True)
    if config.train.ema_decay:
        export_run(folder, folder / TOWER_EMA, last, True, replace=True)
