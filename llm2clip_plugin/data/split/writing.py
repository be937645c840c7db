"""Write the two sides of a split: tars are copied member by member, lists of rows refer to the same images."""

from __future__ import annotations

import tarfile
from functools import partial
from pathlib import Path

import numpy as np

from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.data.pool import cores, parallel
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.data.sources.tar_scan import split_name
from llm2clip_plugin.data.sources.urls import has_suffix
from llm2clip_plugin.data.sources.webdataset import TarSource
from llm2clip_plugin.data.split.sides import Sides
from llm2clip_plugin.progress import track

SIDES = ("train", "validation")


def outputs(source: Source, folder: Path) -> dict[str, Path]:
    """Side -> the folder of tars, or the list, that it is written to."""
    if isinstance(source, TarSource):
        return {side: folder / side for side in SIDES}
    suffix = ".json" if has_suffix(source.path, ".json") else ".jsonl"
    return {side: folder / f"{side}{suffix}" for side in SIDES}


def write_sides(source: Source, sides: Sides, folder: Path, workers: int = 0) -> None:
    """Write both sides below ``folder``; tars that an earlier call completed there are skipped.

    Raises ValueError for another kind of source.
    """
    if isinstance(source, TarSource):
        jobs = list(enumerate(sides.shards))
        done = parallel(partial(_copy_shard, source, folder), jobs, processes=min(workers or cores(), len(jobs)))
        for _ in track(done, total=len(jobs), label="data split: writing", unit="shards"):
            pass
    elif isinstance(source, RowSource):
        _write_rows(source, sides, outputs(source, folder))
    else:
        raise ValueError(
            f"{source.path} is read by {type(source).__name__}, which cannot be split; use tars or a .jsonl"
        )


def _copy_shard(source: TarSource, folder: Path, job: tuple[int, np.ndarray]) -> None:
    """Copy the members of one tar to its two sides."""
    number, held_out_N = job
    shard = source.shards[number]
    keys: dict[str, set[str]] = {side: set() for side in SIDES}
    for within, held_out in enumerate(held_out_N.tolist()):
        keys[SIDES[held_out]].add(source.key(shard.start + within))
    if both := keys["train"] & keys["validation"]:
        raise ValueError(
            f"shard {shard.name!r} has two samples with the key {min(both)!r}, one on each side; rename one of them"
        )
    for side, wanted in keys.items():
        target = folder / side / f"{shard.name}.tar"
        if wanted and not target.exists():
            with atomic_file(target) as temporary:
                source.use_shard(number, partial(_copy_members, wanted=wanted, target=temporary))


def _copy_members(path: Path, *, wanted: set[str], target: Path) -> None:
    with tarfile.open(path, "r:") as old, tarfile.open(target, "w") as new:
        for member in old:
            if member.isreg() and split_name(member.name)[0] in wanted:
                new.addfile(member, old.extractfile(member))


def _write_rows(source: RowSource, sides: Sides, targets: dict[str, Path]) -> None:
    """Each row as it is stored, in its order; a .json stays one list."""
    held_out_N = np.concatenate(sides.shards)
    for side, held_out in zip(SIDES, (False, True), strict=True):
        numbers = np.flatnonzero(held_out_N == held_out).tolist()
        label, is_list = f"data split: {side}", targets[side].suffix.lower() == ".json"
        with atomic_file(targets[side]) as temporary, temporary.open("wb") as file:
            file.write(b"[\n" if is_list else b"")
            for place, number in enumerate(track(numbers, total=len(numbers), label=label, unit="rows")):
                file.write((b",\n" if is_list and place else b"") + source.row(number).strip())
                file.write(b"" if is_list else b"\n")
            file.write(b"\n]\n" if is_list else b"")
