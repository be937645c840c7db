"""Faults of tars, indexes and caches: named with file and sample before or while training reads them, or repaired."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import Fault, World, copied, meet, rows
from safetensors import safe_open
from safetensors.torch import save_file

from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import RunRecord

TAR, OTHER = "data/00000.tar", "data/00001.tar"


@pytest.fixture(scope="module")
def indexed(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose data has been read once, so that its indexes and digests are kept."""
    world = copied(whole, tmp_path_factory.mktemp("indexed") / "w")
    assert main(world.train("--dry-run")) == 0
    assert {path.name.partition("-")[0] for path in world.folder.glob("data/.llm2clip/*-*")} == {"captions", "shards"}
    return world.folder


@pytest.fixture
def read_before(indexed: Path, tmp_path: Path) -> World:
    return copied(indexed, tmp_path / "w")


def write(path: Path, data: bytes) -> None:
    """Other content under the same time."""
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, file.read()) for member in tar.getmembers() if (file := tar.extractfile(member))]


def rewrite(path: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    """Write the members of a tar anew, under the same time."""
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        for name, data in change(members(path)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    write(path, body.getvalue())


def reversed_samples(found: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    pairs = [found[start : start + 2] for start in range(0, len(found), 2)]
    return [member for pair in reversed(pairs) for member in pair]


def exchanged_captions(world: World) -> None:
    """Two captions of the same length, so that size, time and every offset stay."""
    one, two = b'"a red half, 0 dark rows"', b'"a red half, 1 dark rows"'
    data = world.path(TAR).read_bytes()
    assert one in data and two in data
    write(world.path(TAR), data.replace(one, b"<first>").replace(two, one).replace(b"<first>", two))


@rows(
    Fault(
        "tar that is cut",
        "",
        "{w}/data/00001.tar: no tar, truncated or damaged: ...; copy or write it again",
        lambda w: w.path(OTHER).write_bytes(w.path(OTHER).read_bytes()[:20000]),
    ),
    Fault(
        "cache file that is missing",
        "",
        "{w}/data/embeddings-.../00000.safetensors is missing, but the manifest lists shard '00000'; ...",
        lambda w: (w.cache / "00000.safetensors").unlink(),
    ),
    Fault(
        "manifest of another width",
        "",
        ".../manifest.json was edited: it has fingerprint ... and width 25, its teacher's settings "
        "give ... and 24; ...",
        lambda w: edit(w, width=25),
    ),
    Fault("manifest of a future version", "", ".../manifest.json...99...", lambda w: edit(w, format_version=99)),
)
def test_refused_before_step_1(fault: Fault, read_before: World, capsys: pytest.CaptureFixture[str]) -> None:
    meet(fault, read_before, read_before.train(f"{fault.words} --dry-run"), capsys)


def edit(world: World, **fields: Any) -> None:
    path = world.cache / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


NOT_ONE = "--max_steps 12 --train.max-broken 0 --heads.steps 0"


@rows(
    Fault(
        "captions exchanged, size and time kept",
        "--max_steps 12 --heads.steps 0",
        "{w}/data/embeddings-.../00000.safetensors: sample '0-0...': caption 'a red half, ... dark rows' (hash ...) "
        "was not embedded; ...",
        exchanged_captions,
    ),
    Fault(
        "order of samples exchanged, size and time kept",
        NOT_ONE,
        "... of 48 samples are broken, more than max_broken 0 allows:",
        lambda w: rewrite(w.path(TAR), reversed_samples),
    ),
    Fault("NaN in the cache", "--global-batch 48 --heads.steps 0", "...embeddings-...", lambda w: nan_in_cache(w)),
)
def test_named_while_it_is_read(fault: Fault, read_before: World, capsys: pytest.CaptureFixture[str]) -> None:
    meet(fault, read_before, read_before.train(fault.words), capsys)


def nan_in_cache(world: World) -> None:
    path = world.cache / "00000.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    tensors["embeddings"][3, 2] = float("nan")
    save_file(tensors, path, metadata)


def test_a_broken_sample_is_named_and_replaced(read_before: World, caplog: pytest.LogCaptureFixture) -> None:
    def break_one(found: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        return [(name, data[:40] if name == "0-003.png" else data) for name, data in found]

    rewrite(read_before.path(TAR), break_one)
    os.utime(read_before.path(TAR))
    assert main(read_before.train("--max_steps 12 --heads.steps 0 --train.max-broken 0.1")) == 0
    assert "broken: sample '0-003' of shard '00000': " in caplog.text
    assert RunRecord.read(read_before.path("new") / RunRecord.FILE).finished
