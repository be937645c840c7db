"""Damaged files that need no model to be read: checkpoints, data, caches, scores."""

import contextlib
import dataclasses
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import Format, run_cases
from tiny_data import make_cache, make_shards

from llava_integration.evaluator.compare.comparison import build
from llava_integration.evaluator.compare.sides import load_sides
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.train.checkpoint import Checkpoints, Loaded, TrainState, load


def digest(*parts: Any) -> str:
    """One hash of texts, bytes and tensors."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = np.asarray(part).tobytes()
        total.update(part if isinstance(part, bytes) else str(part).encode())
    return total.hexdigest()


# a run folder


def make_run(folder: Path) -> None:
    """Two checkpoints; truth.json has what each holds."""
    checkpoints = Checkpoints(folder, keep=0)
    truth = {}
    torch.manual_seed(0)
    for step in (1, 2):
        state = TrainState(
            step=step,
            samples=8 * step,
            config={"train": {"lr": 1e-3}},
            config_hash="h",
            seed=0,
            metrics={"r": 0.5},
        )
        weights = {"w": torch.randn(4, 6), "b": torch.randn(6)}
        moments = {"w.exp_avg": torch.randn(4, 6)}
        checkpoints.write(
            state, {"model.safetensors": weights, "optimizer.safetensors": moments}
        )
        truth[f"step-{step:08d}"] = content_of(load(checkpoints.path(step)))
    (folder / "truth.json").write_text(json.dumps(truth))


def content_of(loaded: Loaded) -> str:
    tensors = [
        (name, part[name].tolist())
        for part in (loaded.weights, loaded.moments)
        for name in sorted(part)
    ]
    return digest(tensors, sorted(dataclasses.asdict(loaded.state).items()))


def load_run(folder: Path) -> str:
    """As a resumed run does: the older checkpoint is as good, if a warning says so."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        path = Checkpoints(folder, keep=0).find("auto")
    assert path is not None
    assert path.name == "step-00000002" or "falling back" in said.getvalue()
    same = (
        content_of(load(path))
        == json.loads((folder / "truth.json").read_text())[path.name]
    )
    return "the checkpoint that was written" if same else "another one"


# data and caches


def make_data(folder: Path) -> None:
    make_shards(folder / "data")
    read_source(folder / "data")  # writes the index


def read_source(path: Path) -> str:
    source = open_source(SourceConfig(path=str(path)))
    parts: list[Any] = []
    for number in range(len(source)):
        sample = source[number]
        parts += [
            sample.key,
            [caption.text for caption in sample.captions],
            sample.read_image(),
        ]
    return digest(*parts)


def make_cached(folder: Path) -> None:
    make_cache(make_shards(folder / "data"))
    load_cache(folder)  # writes the proof


def load_cache(folder: Path) -> str:
    """As a training does: the cache is proven for its data, then the rows of every sample are
    read."""
    (directory,) = (folder / "data").glob("embeddings-*")
    cache = EmbeddingCache.open(directory)
    source = open_source(SourceConfig(path=str(folder / "data")))
    cache.check(source)
    cache.verify()
    parts: list[Any] = [cache.fingerprint]
    for number in range(len(source)):
        key, captions = source.captions(number)
        parts.append(cache.rows(*source.locate(number), captions, key=key))
    return digest(*parts)


# LLaVA's side


def make_scores(folder: Path) -> None:
    for model, shift in (("old", 0), ("new", 1)):
        items = [
            {"id": n, "score": float((n + shift) % 3 > 0), "cluster": n // 2}
            for n in range(24)
        ]
        about = {
            "counts": {"missing": 0},
            "model": model,
            "provenance": {"data": "d"},
            "notes": ["n"],
        }
        made = ScoreFile(
            benchmark="own", metrics={"accuracy": 0.5}, items=items, **about
        )
        made.write(folder / model / "own.scores.json")


def load_scores(folder: Path) -> str:
    comparison = build(load_sides([folder / "old", folder / "new"], []))
    return json.dumps(comparison.to_dict())


FORMATS = [
    (
        Format(
            "checkpoints", make_run, load_run, files=("checkpoints/**/*.safetensors",)
        ),
        60,
    ),
    (
        Format(
            "tar index",
            make_data,
            lambda folder: read_source(folder / "data"),
            files=("data/.*/*",),
        ),
        40,
    ),
    (Format("cache", make_cached, load_cache, files=("data/embeddings-*/**/*",)), 50),
    (Format("proof", make_cached, load_cache, files=("data/.llm2clip/*",)), 25),
    (Format("scores", make_scores, load_scores, free_text=True), 40),
]


@pytest.mark.parametrize("form, cases", FORMATS, ids=[form.name for form, _ in FORMATS])
def test_damaged(
    form: Format, cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_cases(form, tmp_path, cases=cases)
