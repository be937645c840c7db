"""``llm2clip data split DATA --output DIR``: hold out a part of a data set, the same one wherever it is run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from llm2clip_plugin.console import track
from llm2clip_plugin.contracts import atomic_file, canonical_json, sha256_text
from llm2clip_plugin.data.remote import has_suffix
from llm2clip_plugin.data.samples import BrokenSample
from llm2clip_plugin.data.sources.base import Shard, Source, SourceConfig, check_fields, open_source
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.data.sources.tars import TarSource, split_name
from llm2clip_plugin.data.workers import cores, parallel
from llm2clip_plugin.options import Command, command

SUMMARY = "split.json"  # in the output: settings and counts
SIDES = ("train", "validation")
SALT = "llm2clip data split\0"  # of the hash, so that it is independent of other uses of the same keys


@dataclass(frozen=True, kw_only=True)
class SplitConfig(SourceConfig):
    """A split of one data set."""

    output: str  # folder to write: train and validation, tars copied or lists that refer to the same images
    validation: float = 0.02  # fraction of the keys, or of the field's values, that is held out
    by: str = ""  # field of the samples' JSON: samples with one value are on one side; "": each sample by its key
    workers: int = 0  # processes; 0: one per core
    dry_run: bool = False  # print the counts and write nothing

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation < 1:
            raise ValueError(f"validation is {self.validation:g}, expected a fraction between 0 and 1, such as 0.02")
        if not self.output:
            raise ValueError("no output folder is set; add --output DIR")


COMMAND = Command(
    name="data split",
    example="llm2clip data split /data/photos --output /data/photos-split --validation 0.02",
    about="Hold out a part of a data set for validation. A sample's side follows from its key, or from a field (--by), "
    "alone: the same in any order of shards. Rerun the same command to resume.",
    settings=SplitConfig,
    arguments="path",
    everyday="output validation by image-folder fields workers dry-run",
    hidden="weight shuffle_window kinds languages",
)


def main(argv: list[str]) -> int:
    """Print the counts and write the split; exit status 0."""
    print("\n".join(split_data(COMMAND.parse(argv))), flush=True)
    return 0


def split_data(config: SplitConfig) -> list[str]:
    """Split ``config.path`` and return the report.

    The output appears when it is complete; what a killed call left in a hidden folder next to it is used by the same
    call again. Raises FileExistsError if the output is there and not of this split, ValueError if it can't be made.
    """
    output, source = Path(config.output), open_source(config)
    check_fields(source)
    if os.path.isdir(source.path) and output.resolve().is_relative_to(Path(source.path).resolve()):
        raise ValueError(f"--output {output} is inside the data, whose subfolders are read too; choose one elsewhere")
    shards, sizes = [(shard.name, shard.size) for shard in source.shards], [size for size, *_ in source.stamps]
    data = sha256_text(canonical_json([shards, sizes, config.key_field, config.image_field]))
    settings = {"data_sha256": data, "validation": config.validation, "by": config.by}
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        summary = output / SUMMARY
        if not summary.is_file() or not settings.items() <= json.loads(summary.read_text(encoding="utf-8")).items():
            raise FileExistsError(f"{output} exists and is not this split of {config.path}; choose another --output")
        return [f"{output} is complete already", *_how_to_read(source, output)]
    hash_N, captions_N = decide(source, config.validation, config.by, config.workers)
    held_out_N = is_held_out(hash_N, config.validation)
    counts, captions, report = dict[str, int](), dict[str, int](), []
    for held_out, side in enumerate(SIDES):
        mine_N = held_out_N == held_out
        counts[side], captions[side] = int(mine_N.sum()), int(captions_N[mine_N].sum())
        share = f" ({100 * counts[side] / len(hash_N):.2f} %)" if held_out else ""
        values = f", {len(np.unique(hash_N[mine_N])):,} values of {config.by!r}" if config.by else ""
        report.append(f"{side}: {counts[side]:,} samples{share}, {captions[side]:,} captions{values}")
    if config.dry_run:
        return report
    partial_output = output.with_name(f".{output.name}.{sha256_text(canonical_json(settings))[:8]}.partial")
    write_sides(source, held_out_N, partial_output, config.workers)
    body = {"data": source.path, **settings, "samples": counts, "captions": captions}
    with atomic_file(partial_output / SUMMARY) as temporary:
        temporary.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if output.is_dir():
        output.rmdir()  # it is empty
    os.replace(partial_output, output)
    return [*report, *_how_to_read(source, output)]


def hash_of(value: str) -> int:
    """The number below 2^64 that decides a value's side."""
    return int.from_bytes(hashlib.sha256((SALT + value).encode("utf-8", "surrogatepass")).digest()[:8], "big")


def is_held_out(hash_N: np.ndarray, validation: float) -> np.ndarray:
    """(N) bool: which of these values belong to validation, a fraction of all."""
    return hash_N < np.uint64(math.ceil(validation * 2.0**64))


def decide(source: Source, validation: float, by: str, workers: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N) uint64 hashes of the samples' keys, or of the field ``by``, which alone decide their sides; (N) captions.

    So a sample stays on its side whatever the order and number of shards, and when others come or go. Raises ValueError
    for a sample without that field, and if one side would be empty.
    """
    processes = min(workers or cores(), len(source.shards))
    read = parallel(partial(_read_shard, source, by), source.shards, processes=processes)
    parts = list(track(read, total=len(source.shards), label="data split: reading", unit="shards"))
    hash_N, captions_N = (np.concatenate(part) for part in zip(*parts, strict=True))
    held_out = int(is_held_out(hash_N, validation).sum())
    if held_out in (0, len(hash_N)):
        raise ValueError(
            f"--validation {validation:g} of {len(np.unique(hash_N))} distinct {f'values of {by!r}' if by else 'keys'} "
            f"leaves nothing for {SIDES[not held_out]}; choose a {'smaller' if held_out else 'larger'} fraction"
        )
    return hash_N, captions_N


def _read_shard(source: Source, by: str, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    samples = range(shard.start, shard.start + shard.size)
    values = [_field(source, sample, by) if by else source.key(sample) for sample in samples]
    captions = [len(source.captions(sample)[1]) for sample in samples]
    return np.array([hash_of(value) for value in values], dtype=np.uint64), np.array(captions, dtype=np.int64)


def _field(source: Source, sample: int, by: str) -> str:
    try:
        record = source.record(sample)
    except BrokenSample as error:
        raise ValueError(f"cannot read the field {by!r} of {error}; llm2clip data check lists all of these") from error
    if record.meta.get(by) in (None, ""):
        known = ", ".join(sorted(record.meta)) or "none"
        where = f"sample {record.key!r} of shard {source.locate(sample)[0]!r}"
        raise ValueError(f"{where} has no field {by!r} (--by); its fields: {known}")
    return canonical_json(record.meta[by])


def outputs(source: Source, folder: Path) -> dict[str, Path]:
    """Side -> the folder of tars, or the list, that it is written to."""
    suffix = ".json" if has_suffix(source.path, ".json") else ".jsonl"
    return {side: folder / (side if isinstance(source, TarSource) else f"{side}{suffix}") for side in SIDES}


def write_sides(source: Source, held_out_N: np.ndarray, folder: Path, workers: int = 0) -> None:
    """Write both sides below ``folder``; tars that an earlier call completed there are skipped."""
    if isinstance(source, TarSource):
        jobs = [(n, held_out_N[one.start : one.start + one.size]) for n, one in enumerate(source.shards)]
        done = parallel(partial(_copy_shard, source, folder), jobs, processes=min(workers or cores(), len(jobs)))
        for _ in track(done, total=len(jobs), label="data split: writing", unit="shards"):
            pass
    elif isinstance(source, RowSource):
        _write_rows(source, held_out_N, outputs(source, folder))
    else:
        raise ValueError(f"{source.path} is a {type(source).__name__}, which cannot be split; use tars or a .jsonl")


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


def _write_rows(source: RowSource, held_out_N: np.ndarray, targets: dict[str, Path]) -> None:
    """Each row as it is stored, in its order; a .json stays one list."""
    for held_out, (side, target) in enumerate(targets.items()):
        numbers = np.flatnonzero(held_out_N == held_out).tolist()
        before, between, after = (b"[\n", b",\n", b"\n]\n") if target.suffix == ".json" else (b"", b"\n", b"\n")
        shown = track(numbers, total=len(numbers), label=f"data split: {side}", unit="rows")
        with atomic_file(target) as temporary, temporary.open("wb") as file:
            for place, number in enumerate(shown):
                file.write((between if place else before) + source.row(number)[1].strip())
            file.write(after)


def _how_to_read(source: Source, output: Path) -> list[str]:
    """The next commands, with the images' folder where these are not copied."""
    paths = outputs(source, output)
    images = ("--image-folder", source.images_folder) if isinstance(source, RowSource) else ()
    return [command("embed", path, *images, "--llm", "LLM") for path in paths.values()] + [
        command("train-tower", paths["train"], "--validation", paths["validation"], *images, "--tower", "TOWER")
    ]
