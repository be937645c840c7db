"""``llm2clip data split DATA --output DIR``: hold out a part of a data set, the same one wherever it is run."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np

from llm2clip_plugin.console import track
from llm2clip_plugin.contracts import atomic_file, canonical_json, sha256_text
from llm2clip_plugin.data.remote import has_suffix
from llm2clip_plugin.data.samples import BrokenSample, caption_hash, words_of
from llm2clip_plugin.data.sources.base import Shard, Source, SourceConfig
from llm2clip_plugin.data.sources.open import check_fields, open_source
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.data.sources.tars import TarSource, split_name
from llm2clip_plugin.data.workers import cores, parallel
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.options import Command, command

SUMMARY = "split.json"  # in the output: settings and counts
SIDES = ("train", "validation")
SALT = "llm2clip data split\0"  # of the hash, so that it is independent of other uses of the same keys
FEW = 4  # shards that are read in this process


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


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The sides of some samples, and what is compared across the split."""

    held_out_N: np.ndarray  # bool, one a sample: True for validation
    group_N: np.ndarray  # int64, hash of the value that decided
    caption_M: np.ndarray  # int64, hash of a caption's words
    owner_M: np.ndarray  # int64, number in the source of a caption's sample

    def samples(self) -> dict[str, int]:
        """Samples of each side."""
        return {"train": int((~self.held_out_N).sum()), "validation": int(self.held_out_N.sum())}

    def captions(self) -> dict[str, int]:
        """Captions of each side."""
        held_out_M = self.held_out_N[self.owner_M]
        return {"train": int((~held_out_M).sum()), "validation": int(held_out_M.sum())}

    def shared_M(self) -> np.ndarray:  # noqa: N802 - a shape
        """Captions of validation whose words are those of one in training."""
        held_out_M = self.held_out_N[self.owner_M]
        return held_out_M & np.isin(self.caption_M, self.caption_M[~held_out_M])


def main(argv: list[str]) -> int:
    """Print the counts and write the split; exit status 0."""
    config = COMMAND.parse(argv)
    print("\n".join(split_data(config)), flush=True)
    return 0


def split_data(config: SplitConfig) -> list[str]:
    """Split ``config.path`` and return the report.

    The output appears when it is complete; what a killed call left in a hidden folder next to it is used by the same
    call again. Raises FileExistsError if the output is there and not of this split, ValueError for a sample without
    the field, a side without samples or a source that cannot be split.
    """
    output, source = Path(config.output), open_source(config)
    check_fields(source)
    if os.path.isdir(source.path) and output.resolve().is_relative_to(Path(source.path).resolve()):
        raise ValueError(
            f"--output {output} is inside the data at {source.path}, whose subfolders are read too: validation would "
            "be trained on; choose a folder elsewhere"
        )
    partial_output, settings = output.with_name(f".{output.name}.partial"), _settings(config, source)
    for folder in (output, partial_output):
        if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]) and not _same(folder, settings):
            raise FileExistsError(
                f"{folder} exists and is not this split of {config.path}; choose another --output, or delete it"
            )
    if (output / SUMMARY).exists():
        return [f"{output} is complete already", *_how_to_read(source, output)]
    sides = decide(source, config.validation, config.by, config.workers)
    if config.dry_run:
        return _report(source, sides, config)
    partial_output.mkdir(parents=True, exist_ok=True)
    _write_summary(partial_output, settings)
    write_sides(source, sides, partial_output, config.workers)
    _verify(config, source, sides, partial_output)
    _write_summary(partial_output, settings | {"samples": sides.samples(), "captions": sides.captions()})
    if output.is_dir():
        output.rmdir()  # it is empty
    os.replace(partial_output, output)
    return [*_report(source, sides, config), *_how_to_read(source, output)]


def is_held_out(value: str, validation: float) -> bool:
    """Whether a value belongs to validation, a fraction of all values."""
    digest = hashlib.sha256((SALT + value).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < validation * 2.0**64


def decide(source: Source, validation: float, by: str, workers: int = 0) -> Sides:
    """Read every sample's JSON once and decide its side: by its key, or by one field, and by nothing else.

    So a sample stays on its side whatever the order and number of shards, and when others come or go.

    by: field of a sample's JSON, all samples with one value being on one side; "": by key. Raises ValueError for a
    sample without that field, and if one side would be empty.
    """
    job = partial(_read_shard, source, validation, by)
    few = len(source.shards) <= FEW
    read = parallel(job, source.shards, processes=1 if few else min(workers or cores(), len(source.shards)))
    parts = list(track(read, total=len(source.shards), label="data split: reading", unit="shards"))
    sides = Sides(**{each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Sides)})
    if empty := [side for side, count in sides.samples().items() if not count]:
        what = f"values of {by!r}" if by else "keys"
        raise ValueError(
            f"--validation {validation:g} of {len(np.unique(sides.group_N))} distinct {what} leaves nothing for "
            f"{empty[0]}; choose a {'larger' if empty[0] == 'validation' else 'smaller'} fraction"
        )
    return sides


def _read_shard(source: Source, validation: float, by: str, shard: Shard) -> Sides:
    values, captions, owners = [], [], []
    for sample in range(shard.start, shard.start + shard.size):
        value = _field(source, sample, by) if by else source.key(sample)
        values.append((is_held_out(value, validation), caption_hash(value)))
        words = [words_of(caption.text) for caption in source.captions(sample)[1]]
        captions += [caption_hash(text) for text in words if text]
        owners += [sample for text in words if text]
    return Sides(
        held_out_N=np.array([side for side, _ in values], dtype=bool),
        group_N=np.array([group for _, group in values], dtype=np.int64),
        caption_M=np.array(captions, dtype=np.int64),
        owner_M=np.array(owners, dtype=np.int64),
    )


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
    if isinstance(source, TarSource):
        return {side: folder / side for side in SIDES}
    suffix = ".json" if has_suffix(source.path, ".json") else ".jsonl"
    return {side: folder / f"{side}{suffix}" for side in SIDES}


def write_sides(source: Source, sides: Sides, folder: Path, workers: int = 0) -> None:
    """Write both sides below ``folder``; tars that an earlier call completed there are skipped.

    Raises ValueError for another kind of source.
    """
    if isinstance(source, TarSource):
        jobs = [(n, sides.held_out_N[one.start : one.start + one.size]) for n, one in enumerate(source.shards)]
        done = parallel(partial(_copy_shard, source, folder), jobs, processes=min(workers or cores(), len(jobs)))
        for _ in track(done, total=len(jobs), label="data split: writing", unit="shards"):
            pass
    elif isinstance(source, RowSource):
        _write_rows(source, sides.held_out_N, outputs(source, folder))
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
    for side, held_out in zip(SIDES, (False, True), strict=True):
        numbers = np.flatnonzero(held_out_N == held_out).tolist()
        is_list = targets[side].suffix == ".json"
        before, between, after = (b"[\n", b",\n", b"\n]\n") if is_list else (b"", b"\n", b"\n")
        shown = track(numbers, total=len(numbers), label=f"data split: {side}", unit="rows")
        with atomic_file(targets[side]) as temporary, temporary.open("wb") as file:
            for place, number in enumerate(shown):
                file.write((between if place else before) + source.row(number).strip())
            file.write(after)


def _settings(config: SplitConfig, source: Source) -> dict[str, object]:
    """What makes it the same split: the data and how its sides are decided."""
    shards, sizes = [(shard.name, shard.size) for shard in source.shards], [size for size, *_ in source.stamps]
    data = sha256_text(canonical_json([shards, sizes, config.key_field, config.image_field]))
    return {"data": source.path, "data_sha256": data, "validation": config.validation, "by": config.by}


def _same(path: Path, settings: dict[str, object]) -> bool:
    try:
        saved = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
        return all(saved.get(name) == settings[name] for name in ("data_sha256", "validation", "by"))
    except (OSError, ValueError, AttributeError):
        return False


def _write_summary(folder: Path, body: dict[str, object]) -> None:
    with atomic_file(folder / SUMMARY) as temporary:
        temporary.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _verify(config: SplitConfig, source: Source, sides: Sides, folder: Path) -> None:
    """Open both sides and compare their numbers of samples."""
    values = {each.name: getattr(config, each.name) for each in fields(SourceConfig)}
    for side, path in outputs(source, folder).items():
        written = open_source(SourceConfig(**{**values, "path": str(path), "images": _images(source)}))
        if len(written) != sides.samples()[side]:
            raise ContractError(
                f"{path} has {len(written)} samples, expected {sides.samples()[side]}: the data changed while it was "
                f"read, or the disk is damaged; delete {folder} and rerun"
            )


def _images(source: Source) -> str:
    return source.images_folder if isinstance(source, RowSource) else ""


def _report(source: Source, sides: Sides, config: SplitConfig) -> list[str]:
    samples, captions, lines = sides.samples(), sides.captions(), []
    for side, held_out in zip(SIDES, (False, True), strict=True):
        share = f" ({100 * samples[side] / sum(samples.values()):.2f} %)" if held_out else ""
        groups = len(np.unique(sides.group_N[sides.held_out_N == held_out]))
        values = f", {groups:,} values of {config.by!r}" if config.by else ""
        lines.append(f"{side}: {samples[side]:,} samples{share}, {captions[side]:,} captions{values}")
    if (shared_M := sides.shared_M()).any():
        examples = [source.captions(owner) for owner in sides.owner_M[shared_M][:3].tolist()]
        shown = "; ".join(f"{key}: {texts[0].text[:60]!r}" for key, texts in examples)
        lines.append(
            f"warning: {int(shared_M.sum()):,} of the {captions['validation']:,} validation captions also occur in "
            f"training (compared without case and punctuation), in samples such as {shown}. To keep "
            "samples that share a field on one side, add --by FIELD"
        )
    return lines


def _how_to_read(source: Source, output: Path) -> list[str]:
    """The next commands, with the images' folder where these are not copied."""
    paths = outputs(source, output)
    images = ("--image-folder", _images(source)) if _images(source) else ()
    return [command("embed", path, *images, "--llm", "LLM") for path in paths.values()] + [
        command("train-tower", paths["train"], "--validation", paths["validation"], *images, "--tower", "TOWER")
    ]
