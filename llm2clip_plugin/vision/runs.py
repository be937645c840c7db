"""A training run's newest checkpoint as a tower directory."""

from __future__ import annotations

import os
from pathlib import Path

from llm2clip_plugin.contracts import ContractError, RunRecord, TowerCard
from llm2clip_plugin.vision.dual import DualConfig, DualEncoder
from llm2clip_plugin.vision.export import WEIGHTS_FILE, export_tower
from llm2clip_plugin.vision.lora import add_lora
from llm2clip_plugin.vision.towers import load_tower, preprocessor_config


def export_run(
    run: str | os.PathLike[str], output: str | os.PathLike[str], *, averages: bool = False, replace: bool = False
) -> TowerCard:
    """The newest checkpoint of a training run as a tower directory; ``averages`` takes the moving averages (EMA).

    Raises FileNotFoundError if the run has no checkpoint yet (or keeps no averages), ContractError if the weights don't
    fit the run's configuration.
    """
    from safetensors.torch import load_file

    folder = Path(run)
    record = RunRecord.read(folder / RunRecord.FILE)
    pointer = folder / "checkpoints" / "latest"
    if not pointer.is_file():
        raise FileNotFoundError(f"no checkpoint in {folder / 'checkpoints'} yet: train, then export")
    checkpoint = pointer.with_name(pointer.read_text(encoding="utf-8").strip())
    dual = build_run_dual(record, where=folder)
    state = load_file(checkpoint / WEIGHTS_FILE)
    if averages:
        if not (checkpoint / "ema.safetensors").is_file():
            raise FileNotFoundError(f"{checkpoint} keeps no moving averages: the run's ema_decay is 0")
        state |= load_file(checkpoint / "ema.safetensors")
    state = {name.removeprefix("dual."): value for name, value in state.items()}  # a run trains Scaled(dual)
    expected = {name: value.shape for name, value in dual.state_dict().items()}
    found = {name: value.shape for name, value in state.items()}
    if wrong := sorted({name for name, _ in found.items() ^ expected.items()}):
        raise ContractError(
            f"{checkpoint / WEIGHTS_FILE} doesn't fit {folder / RunRecord.FILE}: "
            f"missing, unknown or misshapen {wrong[:10]}"
        )
    dual.load_state_dict(state)
    return export_tower(
        dual,
        output,
        origin=record.config["tower"]["path"],
        teacher=record.teacher,
        training={"steps": record.step, "samples": record.samples, "config_hash": record.config_hash},
        metrics=record.metrics,
        preprocessor=preprocessor_config(record.config["tower"]["path"]),
        replace=replace,
    )


def build_run_dual(record: RunRecord, *, where: Path) -> DualEncoder:
    """The dual encoder of a run's configuration, its tower as it started."""
    tower, dual = record.config.get("tower"), record.config.get("dual")
    if not isinstance(tower, dict) or not isinstance(dual, dict):
        raise ContractError(
            f"{where / RunRecord.FILE} has no tower and dual in its configuration: no run of train-tower"
        )
    config = DualConfig(**{**dual, "llm_width": dual.get("llm_width") or record.teacher["width"]})
    model = DualEncoder(load_tower(tower["path"], image_size=tower.get("image_size") or None), config)
    if tower.get("lora_rank"):
        add_lora(model.tower, rank=tower["lora_rank"], alpha=tower["lora_alpha"])
    return model
