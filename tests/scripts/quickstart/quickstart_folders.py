"""Folders for the quickstart's tests: caches of random embeddings, the records of trainings, and
what a LLaVA is made from.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import inherited
import measure
import torch
from safetensors.torch import save_file

from llm2clip_plugin.contracts import RunRecord, TeacherIdentity
from llm2clip_plugin.data.cache_file import caption_rows, shard_captions
from llm2clip_plugin.data.cache_writer import CacheWriter
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.text.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_sha256

WIDTH = 16
IDENTITY = TeacherIdentity(
    llm="random",
    revision="",
    weights_sha256="0",
    adapter_sha256="",
    attention="causal",
    pooling="last",
    layer=-1,
    prompt="",
    chat_template="",
    max_tokens=8,
    width=WIDTH,
    post="0",
)


def write_cache(
    data: Path, directory: Path, identity: TeacherIdentity = IDENTITY
) -> None:
    """A whole cache whose embeddings are random, each caption's decided by its text."""
    source = open_source(SourceConfig(path=str(data)))
    writer = CacheWriter(directory, identity)
    for shard in source.shards:
        keys, captions = shard_captions(source, shard)
        rows = caption_rows(captions)
        seeds = [abs(caption_hash) for _, caption_hash in rows]
        vectors = [
            torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        writer.write_shard(shard.name, keys, rows, torch.stack(vectors))
    writer.finish()


def write_adapter(
    data: Path, seed: int = 0, *, shard: str = "train-noto.tar"
) -> TeacherIdentity:
    """An adapter below ``data/llm`` with the record of its training on ``shard``; the teacher that
    it makes."""
    run = data / "llm" / f"seed{seed}"
    (run / "adapter").mkdir(parents=True)
    save_file(
        {"lora": torch.full((1,), float(seed))}, run / "adapter" / ADAPTER_WEIGHTS
    )
    (run / "adapter" / ADAPTER_CONFIG).write_text("{}")
    RunRecord(config={"pairs": {"data": [f"emoji/{shard}"]}}, config_hash="").write(
        run / RunRecord.FILE
    )
    return dataclasses.replace(
        IDENTITY, post="", adapter_sha256=adapter_sha256(run / "adapter")
    )


def write_run(output: Path, name: str, **data: object) -> None:
    """The record of a tower's training below ``output``; ``data``: what differs from the
    quickstart's."""
    side, _, seed = name.partition("-seed")
    read = {
        "path": [f"data/{measure.training_shards(side)}"],
        "cache": [f"data/cache/{side}"],
        "validation": "",
        **data,
    }
    config = {"data": read, "train": {"seed": int(seed), "max_steps": 50}}
    RunRecord(config=config, config_hash="").write(
        output / "runs" / name / RunRecord.FILE
    )


def write_towers(folder: Path, names: Iterable[str]) -> None:
    """Weights of a language model, below ``llm``, and of towers, below ``towers``; each tower's are
    others."""
    (folder / "llm").mkdir()
    save_file({"llm": torch.zeros(1)}, folder / "llm" / "model.safetensors")
    for number, name in enumerate(names):
        tower = folder / "towers" / name
        tower.mkdir(parents=True)
        save_file({"tower": torch.full((1,), number)}, tower / "model.safetensors")


def answer_without_training(monkeypatch, answers: Mapping[str, Any]) -> None:
    """Let ``inherited.llava_answers`` take these answers of ``ARM-seedN`` instead of training."""
    monkeypatch.setattr(inherited, "train_llava", lambda tower, *_: tower)
    monkeypatch.setattr(inherited, "ask", lambda tower, _: answers[tower.name])
