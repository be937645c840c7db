"""Write the two sides of a split: tars are copied member by member, lists of rows refer to the same images."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from llm2clip_plugin.contracts import atomic_file, size_text
from llm2clip_plugin.data.pool import cores, map_in_order, process_pool
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.data.sources.tar_scan import split_name
from llm2clip_plugin.data.sources.urls import has_suffix
from llm2clip_plugin.data.sources.webdataset import TarSource
from llm2clip_plugin.data.split.sides import Sides
from llm2clip_plugin.progress import track

SIDES = ("train", "validation")
DONE = ".done"  # folder of marks: one for each tar of the source whose copies are complete


def outputs(source: Source, folder: Path) -> dict[str, Path]:
    """Side -> the folder of tars, or the list, that it is written to."""
    if isinstance(source, TarSource):
        return {side: folder / side for side in SIDES}
    suffix = ".json" if has_suffix(source.path, ".json") else ".jsonl"
    return {side: folder / f"{side}{suffix}" for side in SIDES}


def write_sides(source: Source, sides: Sides, folder: Path, workers: int = 0) -> None:
    """Write both sides below ``folder``; what an earlier call completed there is kept.

    Raises OSError if the disk has too little space for copies of the tars, ValueError for another kind of source.
    """
    if isinstance(source, TarSource):
        _write_tars(source, sides, folder, workers)
    elif isinstance(source, RowSource):
        _write_rows(source, sides, outputs(source, folder))
    else:
        raise ValueError(
            f"{source.path} is read by {type(source).__name__}, which cannot be split; use tars or a .jsonl"
        )


def _write_tars(source: TarSource, sides: Sides, folder: Path, workers: int) -> None:
    todo = [n for n, shard in enumerate(source.shards) if not _mark(folder, shard.name).exists()]
    needed, free = sum(source.stamps[n][0] for n in todo), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the copies of {len(todo)} tars need {size_text(needed)}, but {folder.parent} has {size_text(free)} "
            "free; free space, or choose an --output on another disk"
        )
    job = partial(_copy_shard, source, folder)
    jobs = [(n, sides.shards[n]) for n in todo]
    label = {"total": len(source.shards), "label": "data split: writing", "unit": "shards"}
    processes = min(workers or cores(), len(todo))
    done = iter(range(len(source.shards) - len(todo)))  # by an earlier call
    if processes <= 1:
        _exhaust(track(_chain(done, map(job, jobs)), **label))
        return
    with process_pool(processes) as pool:
        _exhaust(track(_chain(done, map_in_order(pool, job, jobs, ahead=2 * processes)), **label))


def _copy_shard(source: TarSource, folder: Path, job: tuple[int, np.ndarray]) -> None:
    """Copy the members of one tar to its two sides; the mark comes last."""
    number, held_out_N = job
    shard = source.shards[number]
    side_of: dict[str, bool] = {}
    for within, held_out in enumerate(held_out_N.tolist()):
        key = source.key(shard.start + within)
        if side_of.setdefault(key, held_out) is not held_out:
            raise ValueError(
                f"shard {shard.name!r} has two samples with the key {key!r}, one on each side; rename one of them"
            )
    for side, held_out in zip(SIDES, (False, True), strict=True):
        if held_out in side_of.values():
            with atomic_file(folder / side / f"{shard.name}.tar") as temporary:
                wanted = {key for key, value in side_of.items() if value is held_out}
                source.use_shard(number, partial(_copy_members, wanted=wanted, target=temporary))
    mark = _mark(folder, shard.name)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _copy_members(path: Path, *, wanted: set[str], target: Path) -> None:
    with tarfile.open(path, "r:") as old, tarfile.open(target, "w") as new:
        for member in old:
            if member.isreg() and split_name(member.name)[0] in wanted:
                new.addfile(member, old.extractfile(member))


def _mark(folder: Path, name: str) -> Path:
    return folder / DONE / f"{name}.done"


def _write_rows(source: RowSource, sides: Sides, targets: dict[str, Path]) -> None:
    """Each row as it is stored, in its order; a .json stays one list."""
    held_out_N = np.concatenate(sides.shards)
    for side, held_out in zip(SIDES, (False, True), strict=True):
        numbers = np.flatnonzero(held_out_N == held_out).tolist()
        is_list = targets[side].suffix.lower() == ".json"
        with atomic_file(targets[side]) as temporary, temporary.open("wb") as file:
            file.write(b"[\n" if is_list else b"")
            for place, number in enumerate(
                track(numbers, total=len(numbers), label=f"data split: {side}", unit="rows")
            ):
                file.write((b",\n" if is_list and place else b"") + source.row(number).strip())
                file.write(b"" if is_list else b"\n")
            file.write(b"\n]\n" if is_list else b"")


def clear_marks(folder: Path) -> None:
    """Remove the marks once everything is written."""
    shutil.rmtree(folder / DONE, ignore_errors=True)


def write_summary(path: Path, body: dict[str, object]) -> None:
    """What the split is, for a rerun of the same command and for its reader."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _chain(*parts: Iterator[object]) -> Iterator[object]:
    for part in parts:
        yield from part


def _exhaust(items: Iterator[object]) -> None:
    for _ in items:
        pass
