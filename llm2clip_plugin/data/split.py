"""``llm2clip data split DATA --output DIR``: hold out a part of a data set, the same one wherever
it is run."""

from __future__ import annotations

import hashlib
import json
import math
import tarfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from llm2clip_plugin.data.remote import has_suffix
from llm2clip_plugin.data.samples import cores, parallel
from llm2clip_plugin.data.sources import (
    Shard,
    Source,
    SourceConfig,
    open_source,
    split_name,
)
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.data.sources.tars import TarSource
from llm2clip_plugin.folders import SPLIT_FOLDER, output_folder
from llm2clip_plugin.hashes import canonical_json
from llm2clip_plugin.options import Command, command, setting
from llm2clip_plugin.progress import track

SIDES = ("train", "validation")
# of the hash, so that it is independent of other uses of the same keys
SALT = "llm2clip data split\0"


@dataclass(frozen=True, kw_only=True)
class SplitConfig(SourceConfig):
    """A split of one data set."""

    output: str = setting(
        help="folder to write: train and validation, tars copied or lists that refer to the same "
        "images",
    )
    validation: float = setting(
        0.02,
        help="fraction of the keys, or of the field's values, that is held out",
    )
    by: str = setting(
        "",
        help="field of the samples' JSON: samples with the same value are held out together or "
        'not at all; "": each sample by its key',
    )
    workers: int = setting(0, help="processes; 0: one per core")
    dry_run: bool = setting(False, help="print the counts and write nothing")
    overwrite: bool = setting(False, help="replace what this command wrote there")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation < 1:
            raise ValueError(
                f"validation is {self.validation:g}, expected a fraction between 0 and 1, "
                "such as 0.02"
            )
        if not self.output:
            raise ValueError("no output folder is set; add --output DIR")


SPLIT = Command(
    name="data split",
    example="llm2clip data split /data/photos --output /data/photos-split --validation 0.02",
    about="Hold out a part of a data set for validation. A sample's side follows from its key, or "
    "from a field (--by), alone: the same in any order of shards.",
    settings=SplitConfig,
    arguments="path",
    everyday="output validation by image-folder workers dry-run overwrite",
    hidden="weight shuffle_window kinds languages",
)


def main_split(argv: list[str]) -> int:
    """Print the counts, write the split, and print the next commands; exit status 0.
    Raises FileExistsError if the output exists, ValueError if the data can't be split."""
    config = SPLIT.parse(argv)
    output = Path(config.output)
    source = open_source(config)
    data = Path(source.path)
    if data.is_dir() and output.resolve().is_relative_to(data.resolve()):
        raise ValueError(
            f"--output {output} is inside the data, whose subfolders are read too; "
            "choose one elsewhere"
        )
    hash_N = decide(source, config.validation, config.by, config.workers)
    held_out_N = is_held_out(hash_N, config.validation)
    counts = {}
    for side in SIDES:
        hash_of_side = hash_N[held_out_N == (side == "validation")]
        samples = len(hash_of_side)
        counts[side] = samples
        line = f"{side}: {samples:,} samples ({samples / len(hash_N):.2%})"
        if config.by:
            line += f", {len(np.unique(hash_of_side)):,} values of {config.by!r}"
        print(line)
    if config.dry_run:
        return 0
    with output_folder(output, SPLIT_FOLDER, replace=config.overwrite) as folder:
        write_sides(source, held_out_N, folder, config.workers)
        about = {
            "data": source.path,
            "validation": config.validation,
            "by": config.by,
            "samples": counts,
        }
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        (folder / "split.json").write_text(text, encoding="utf-8")
    paths = outputs(source, output)
    images = ()
    if isinstance(source, RowSource):
        images = ("--image-folder", source.images_folder)
    for path in paths.values():
        print(command("embed", path, *images, "--llm", "LLM"))
    sides = (paths["train"], "--validation", paths["validation"])
    print(command("train-tower", *sides, *images, "--tower", "TOWER"))
    return 0


def hash_of(value: str) -> int:
    """The number below 2^64 that decides a value's side."""
    text = SALT + value
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def is_held_out(hash_N: np.ndarray, validation: float) -> np.ndarray:
    """(N) bool: which of these values belong to validation, a fraction of all."""
    return hash_N < np.uint64(math.ceil(validation * 2.0**64))


def decide(source: Source, validation: float, by: str, workers: int = 0) -> np.ndarray:
    """(N) uint64 hashes of the samples' keys, or of the field ``by``, which alone decide their
    sides, whatever the order of shards. Raises ValueError for a sample without that field, and if
    one side would be empty."""
    processes = min(workers or cores(), len(source.shards))
    read = parallel(
        partial(_read_shard, source, by), source.shards, processes=processes
    )
    tracked = track(
        read, total=len(source.shards), label="data split: reading", unit="shards"
    )
    hash_N = np.concatenate(list(tracked))
    held_out = int(is_held_out(hash_N, validation).sum())
    if held_out in (0, len(hash_N)):
        empty = "train" if held_out else "validation"
        size = "smaller" if held_out else "larger"
        distinct = len(np.unique(hash_N))
        values = f"values of {by!r}" if by else "keys"
        raise ValueError(
            f"--validation {validation:g} of {distinct} distinct {values} "
            f"leaves nothing for {empty}; choose a {size} fraction"
        )
    return hash_N


def _read_shard(source: Source, by: str, shard: Shard) -> np.ndarray:
    samples = range(shard.start, shard.start + shard.size)
    values = [
        _field(source, sample, by) if by else source.key(sample) for sample in samples
    ]
    return np.array([hash_of(value) for value in values], dtype=np.uint64)


def _field(source: Source, sample: int, by: str) -> str:
    record = source.record(sample)
    if record.meta.get(by) in (None, ""):
        fields = ", ".join(sorted(record.meta)) or "none"
        where = f"sample {record.key!r} of shard {source.locate(sample)[0]!r}"
        raise ValueError(f"{where} has no field {by!r} (--by); its fields: {fields}")
    return canonical_json(record.meta[by])


def outputs(source: Source, folder: Path) -> dict[str, Path]:
    """Side -> the folder of tars, or the list, that it is written to."""
    if isinstance(source, TarSource):
        return {side: folder / side for side in SIDES}
    suffix = ".json" if has_suffix(source.path, ".json") else ".jsonl"
    return {side: folder / f"{side}{suffix}" for side in SIDES}


def write_sides(
    source: Source, held_out_N: np.ndarray, folder: Path, workers: int = 0
) -> None:
    """Write both sides below ``folder``."""
    if isinstance(source, TarSource):
        _write_tars(source, held_out_N, folder, workers)
        return
    if not isinstance(source, RowSource):
        raise ValueError(
            f"{source.path} is a {type(source).__name__}, which cannot be split; "
            "use tars or a .jsonl"
        )
    for side, target in outputs(source, folder).items():
        numbers = np.flatnonzero(held_out_N == (side == "validation")).tolist()
        tracked = track(
            numbers, total=len(numbers), label=f"data split: {side}", unit="rows"
        )
        _write_rows(source, tracked, target)


def _write_tars(
    source: TarSource, held_out_N: np.ndarray, folder: Path, workers: int
) -> None:
    """Copy every tar to tars of both sides."""
    jobs = []
    for number, shard in enumerate(source.shards):
        jobs.append((number, held_out_N[shard.start : shard.start + shard.size]))
    processes = min(workers or cores(), len(jobs))
    done = parallel(partial(_copy_shard, source, folder), jobs, processes=processes)
    for _ in track(done, total=len(jobs), label="data split: writing", unit="shards"):
        pass


def _write_rows(source: RowSource, numbers: Iterable[int], target: Path) -> None:
    """Write each row as it is stored, in order: a list if ``target`` is a .json, else lines."""
    before = b""
    between = b"\n"
    after = b"\n"
    if target.suffix == ".json":
        before = b"[\n"
        between = b",\n"
        after = b"\n]\n"
    with target.open("wb") as file:
        separator = before
        for number in numbers:
            file.write(separator + source.row(number)[1].strip())
            separator = between
        file.write(after)


def _copy_shard(source: TarSource, folder: Path, job: tuple[int, np.ndarray]) -> None:
    """Copy the members of a tar's samples, whatever they hold, to tars of their sides."""
    number, held_out_N = job
    shard = source.shards[number]
    side_of: dict[str, str] = {}
    for sample, held_out in enumerate(held_out_N.tolist(), shard.start):
        key = source.key(sample)
        side = "validation" if held_out else "train"
        if side_of.setdefault(key, side) != side:
            raise ValueError(
                f"shard {shard.name!r} has two samples with the key {key!r}, one on each side; "
                "rename one"
            )

    def copy(path: Path) -> None:
        new: dict[str, tarfile.TarFile] = {}
        with ExitStack() as opened:
            old = opened.enter_context(tarfile.open(path, "r:"))
            for member in old:
                side = side_of.get(split_name(member.name)[0], "")
                if not side or not member.isreg():
                    continue
                if side not in new:
                    target = folder / side / f"{shard.name}.tar"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    new[side] = opened.enter_context(tarfile.open(target, "w"))
                new[side].addfile(member, old.extractfile(member))

    source.use_shard(number, copy)
