"""Faults of tars and caches: named with their file before training reads them."""

import json
from typing import Any

import pytest
from planted_faults import Fault, World, halve, meet, rows

SHARD = "00000.safetensors"


@rows(
    Fault(
        "tar that is cut",
        "",
        "{w}/data/00001.tar: ...",
        lambda w: halve(w.path("data/00001.tar")),
    ),
    Fault(
        "no file of a cache",
        "",
        "{w}/data/...00000.safetensors...",
        lambda w: (w.cache / SHARD).unlink(),
    ),
    Fault(
        "another width",
        "",
        ".../manifest.json ...fingerprint...25...24...",
        lambda w: edit(w, width=25),
    ),
    Fault(
        "manifest of a future version",
        "",
        ".../manifest.json...99...",
        lambda w: edit(w, format_version=99),
    ),
)
def test_refused_before_step_1(
    fault: Fault, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    meet(fault, world, world.train(f"{fault.words} --dry-run"), capsys)


def edit(world: World, **fields: Any) -> None:
    path = world.cache / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
