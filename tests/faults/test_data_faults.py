"""Faults of tars and caches: named with their file before training reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from faults import Fault, World, meet, rows


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20000])


@rows(
    Fault(
        "tar that is cut",
        "",
        "{w}/data/00001.tar: no tar, compressed, truncated or damaged: ...; copy or write it again",
        lambda w: cut(w.path("data/00001.tar")),
    ),
    Fault(
        "cache file that is missing",
        "",
        "{w}/data/embeddings-.../00000.safetensors is missing, but the manifest lists it; ...",
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
def test_refused_before_step_1(fault: Fault, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    meet(fault, world, world.train(f"{fault.words} --dry-run"), capsys)


def edit(world: World, **fields: Any) -> None:
    path = world.cache / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
