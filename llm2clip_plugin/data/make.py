"""Data sets that are written, whole or not at all: tars of pictures and captions, splits, and
LLaVA's captions.json.

``llm2clip data make FOLDER|TABLE``, ``llm2clip data split DATA``, ``llm2clip llava data DATA``
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tarfile
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from llm2clip_plugin.atomic import size_text
from llm2clip_plugin.data.listing import Item, in_folder, in_table, join_copies, words_of_name
from llm2clip_plugin.data.remote import has_suffix
from llm2clip_plugin.data.samples import (
    DEFAULT_FIELDS,
    BrokenImage,
    BrokenSample,
    cores,
    has_transparency,
    holds_words,
    load,
    open_header,
    parallel,
    parse_fields,
    read_captions,
    select_captions,
)
from llm2clip_plugin.data.sources import (
    Shard,
    Source,
    SourceConfig,
    check_fields,
    open_source,
    split_name,
)
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.data.sources.tars import TarSource
from llm2clip_plugin.data.tables import PICTURES
from llm2clip_plugin.folders import LLAVA_FOLDER, MAKE_FOLDER, SPLIT_FOLDER, output_folder
from llm2clip_plugin.hashes import canonical_json
from llm2clip_plugin.options import Command, command, setting
from llm2clip_plugin.outside import MAX_IMAGE, read_regular
from llm2clip_plugin.progress import track

TABLES = (".csv", ".tsv")
# copied as they are; others become PNG
STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
SHARD_BYTES = 256_000_000  # of a tar
LANGUAGE = "en"  # of captions without one
LEFT_OUT = "left-out.jsonl"  # in the output: {"image", "reason"} of each picture that is in no tar


@dataclass(frozen=True, kw_only=True)
class MakeConfig:
    """What WebDataset tars are made of."""

    path: str = setting(
        help="folder of pictures with a .txt or .json of the same name, or a .csv or .tsv",
        option="data",
    )
    output: str = setting(help="folder to write; it appears when it is complete")
    images: str = setting(
        "",
        help="folder that a table's image paths start from; \"\": the table's own",
        option="image-folder",
    )
    image_field: str = setting(
        "",
        help='column of the image\'s path; "": image, file_name, path and the like',
    )
    fields: tuple[str, ...] = setting(
        (*DEFAULT_FIELDS, "text=short", "title=short"),
        help="columns, or fields of a picture's .json, that are captions: NAME=KIND or "
        "NAME=KIND:LANGUAGE; txt is the .txt",
    )
    file_names: bool = setting(
        False,
        help='a picture without a caption gets its file name as one: red-fox_2.jpg, "red fox"',
    )
    background: str = setting(
        "",
        help='white | gray | black: put transparent pictures on it; "": left as they are',
    )
    workers: int = setting(0, help="processes; 0: one per core")
    overwrite: bool = setting(False, help="replace what this command wrote there")

    def __post_init__(self) -> None:
        parse_fields(self.fields, LANGUAGE)
        if self.background not in ("", "white", "gray", "black"):
            raise ValueError(f"background is {self.background!r}, expected white, gray or black")
        folders = [Path(folder).resolve() for folder in (self.path, self.images) if folder]
        if any(folder.is_relative_to(Path(self.output).resolve()) for folder in folders):
            raise ValueError(f"--output {self.output} contains the pictures; choose another folder")


COMMAND = Command(
    name="data make",
    example="llm2clip data make photos --output photos-tars",
    about="Write WebDataset tars, which all commands read, from a folder of pictures or a table. "
    "Rows with the same image, and exact copies of a picture, are joined to one sample with "
    "several captions. Unreadable pictures, those without a caption and links out of the folder "
    "are left out and listed.",
    settings=MakeConfig,
    arguments="path",
    everyday="output image-folder image-field fields file-names background workers overwrite",
)


def main(argv: list[str]) -> int:
    """Write tars and a list of what was left out, and print what is in them; exit status 0.
    Raises FileExistsError if the output exists, ValueError if nothing can be used."""
    config = COMMAND.parse(argv)
    items = list_items(config)
    joined = join_copies(items, config.workers or cores())
    with output_folder(config.output, MAKE_FOLDER, replace=config.overwrite) as folder:
        size = _write(config, items, folder)
        left_out = [(item.name, item.problem) for item in items if item.problem]
        if len(left_out) == len(items):
            raise ValueError(
                f"none of the {len(items)} files in {config.path} can be used: {_why(items[0])}"
            )
        rows = [{"image": image, "reason": reason} for image, reason in left_out]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / LEFT_OUT).write_text("".join(lines), encoding="utf-8", errors="replace")
    samples = len(items) - len(left_out)
    captions = sum(len(item.captions) for item in items if not item.problem)
    print(f"{config.output}: {samples:,} samples, {captions:,} captions, {size_text(size)}")
    if joined:
        print(f"joined from exact copies: {joined:,} {'caption' if joined == 1 else 'captions'}")
    if left_out:
        reasons = Counter(reason.partition(":")[0] for _, reason in left_out)
        counts = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())
        listed_in = os.path.join(config.output, LEFT_OUT)
        print(f"left out: {len(left_out):,} ({counts}), all in {listed_in}")
    print(command("data", "check", config.output), flush=True)
    return 0


def _why(item: Item) -> str:
    """Why an item is left out, and what to do if it has no caption."""
    if item.problem != "no caption":
        return f"{item.name}: {item.problem}"
    fixes = ["write captions to .txt files of the same names", "add --file-names"]
    texts = [f"{name}=short" for name, value in item.meta.items() if holds_words(value)]
    if texts:
        fixes.insert(0, f"use a field with text, --fields {' '.join(texts)}")
    return f"{item.name}: no caption; {', or '.join(fixes)}"


def list_items(config: MakeConfig) -> list[Item]:
    """Every picture of ``config.path``, in order of name or row; rows of the same picture are one.
    Raises ValueError if it is neither a folder nor a table, or has no pictures or captions."""
    path = Path(config.path)
    fields = parse_fields(config.fields, LANGUAGE)
    names = {field.name for field in fields}
    if path.is_dir():
        folder = path
        rows = in_folder(path)
    elif path.suffix.lower() in TABLES and path.is_file():
        folder = Path(config.images or path.parent)
        rows = in_table(
            path, folder, names, config.image_field, needs_captions=not config.file_names
        )
    else:
        raise ValueError(f"{path} is neither a folder of pictures nor a table ({' '.join(TABLES)})")
    items: dict[str, Item] = {}
    used = {"captions", *names}
    for name, row in rows:
        problem = "" if name else "no image path"
        item = items.setdefault(name, Item(name, folder / name, problem=problem))
        if isinstance(row, str):
            item.problem = row
            continue
        try:
            captions, _ = read_captions(row, fields)
        except (ValueError, RecursionError) as error:
            item.problem = f"unreadable caption: {error}"
            continue
        item.add_captions(map(vars, captions))
        item.meta = {name: value for name, value in row.items() if name not in used} | item.meta
    if not items and path.is_file():
        raise ValueError(f"{path} has a header and no rows; expected a row a picture")
    if all(item.problem == "not a picture" for item in items.values()):
        raise ValueError(
            f"no pictures in {path} ({' '.join(PICTURES)}); "
            "tars are read by all commands as they are"
        )
    for item in items.values():
        if item.problem or item.captions:
            continue
        text = words_of_name(item.name) if config.file_names else ""
        if text:
            item.captions = [{"text": text, "kind": "short", "language": LANGUAGE}]
        else:
            item.problem = "no caption"
    return list(items.values())


def read_picture(background: str, item: Item) -> tuple[bytes, str] | str:
    """A picture as it goes into a tar and its extension, or why there is none. It is decoded once,
    and put on ``background`` if it is transparent."""
    if item.problem:
        return item.problem
    try:
        data = read_regular(item.path, MAX_IMAGE)
        image = open_header(data)
        transparent = has_transparency(image)
        extension = STORED.get(image.format or "", "")
        flat = load(image)
    except ValueError as error:  # BrokenImage, too
        return f"unreadable: {error}"
    except FileNotFoundError:
        return f"no file: {item.path}"
    except OSError as error:
        return f"unreadable: {error.strerror}"
    if transparent and (background or not extension):
        flat = image.convert("RGBA")
    if transparent and background:
        flat = Image.alpha_composite(Image.new("RGBA", image.size, background), flat).convert("RGB")
        extension = ""
    if not extension:
        buffer = io.BytesIO()
        flat.save(buffer, "PNG")
        data = buffer.getvalue()
        extension = "png"
    return data, extension


def _write(config: MakeConfig, items: list[Item], folder: Path) -> int:
    """Write tars of the items that can be used, and note the problems of the others; bytes of
    pictures."""
    tar = None
    shard = 0
    total = 0
    keys: set[str] = set()
    processes = min(config.workers or cores(), len(items) // 64)
    pictures = parallel(partial(read_picture, config.background), items, processes=processes)
    with ExitStack() as opened:
        tracked = track(pictures, total=len(items), label="data make", unit="pictures")
        for item, picture in zip(items, tracked, strict=True):
            if isinstance(picture, str):
                item.problem = picture
                continue
            if tar is None or tar.offset > SHARD_BYTES:
                opened.close()
                tar = opened.enter_context(tarfile.open(folder / f"{shard:05d}.tar", "w"))
                shard += 1
            data, extension = picture
            total += len(data)
            meta = {**item.meta, "captions": item.captions}
            text = json.dumps(meta, ensure_ascii=False, default=str)
            key = item.key
            while key in keys:  # a.jpg and a.png are two samples
                key += "-2"
            keys.add(key)
            members = {extension: data, "json": text.encode("utf-8", "replace")}
            for suffix, body in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    return total


# ``llm2clip llava data DATA --output DIR``: a data set as LLaVA's pretraining reads it,
# captions.json and images.


@dataclass(frozen=True, kw_only=True)
class LlavaDataConfig(SourceConfig):
    """Captions for LLaVA's first stage, one an image."""

    output: str = setting(
        help="folder to write: captions.json and images; it appears when it is complete",
    )
    overwrite: bool = setting(False, help="replace what this command wrote there")


LLAVA_DATA = Command(
    name="llava data",
    example="llm2clip llava data photos-tars --output photos-llava",
    about="Write captions.json and images for scripts/llava/pretrain.sh: each image with its first "
    "caption. Samples that can't be read are left out.",
    settings=LlavaDataConfig,
    arguments="path",
    everyday="output image-folder fields kinds languages overwrite",
    hidden="weight shuffle_window",
)


def main_llava_data(argv: list[str]) -> int:
    """Write the folder. Raises FileExistsError if it exists, ValueError if no sample is usable."""
    config = LLAVA_DATA.parse(argv)
    source = open_source(config)
    rows = []
    output = Path(config.output)
    check_fields(source, needed=True)
    with output_folder(output, LLAVA_FOLDER, replace=config.overwrite) as folder:
        (folder / "images").mkdir()
        numbers = range(len(source))
        for number in track(numbers, total=len(source), label="llava data", unit="samples"):
            try:
                sample = source[number]
                captions = select_captions(sample.captions, config.kinds, config.languages)
                data = sample.read_image()
                image = open_header(data)
                load(image)  # a picture that is cut has a good header
                name = f"{number:08d}.{(image.format or '').lower()}"
            except (BrokenSample, BrokenImage):
                continue
            if captions:
                (folder / "images" / name).write_bytes(data)
                turns = [
                    {"from": "human", "value": "<image>"},
                    {"from": "gpt", "value": captions[0].text},
                ]
                rows.append({"id": sample.key, "image": name, "conversations": turns})
        if not rows:
            raise ValueError(
                f"no sample of {config.path} can be used; "
                f"llm2clip data check {config.path} shows why"
            )
        text = json.dumps(rows, ensure_ascii=False, indent=1)
        (folder / "captions.json").write_text(text, encoding="utf-8")
    summary = f"{config.output}: {len(rows):,} images with a caption"
    if len(rows) < len(source):
        summary += f", {len(source) - len(rows):,} left out"
    print(summary)
    return 0


# ``llm2clip data split DATA --output DIR``: hold out a part of a data set, the same one wherever it
# is run.

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
        help='field of the samples\' JSON: samples with one value are on one side; "": each '
        "sample by its key",
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
    if os.path.isdir(source.path) and output.resolve().is_relative_to(Path(source.path).resolve()):
        raise ValueError(
            f"--output {output} is inside the data, whose subfolders are read too; "
            "choose one elsewhere"
        )
    hash_N = decide(source, config.validation, config.by, config.workers)
    held_out_N = is_held_out(hash_N, config.validation)
    counts = {}
    for side in SIDES:
        hash_of_side = hash_N[held_out_N == (side == "validation")]
        counts[side] = len(hash_of_side)
        line = f"{side}: {counts[side]:,} samples ({counts[side] / len(hash_N):.2%})"
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
    images = ("--image-folder", source.images_folder) if isinstance(source, RowSource) else ()
    for path in paths.values():
        print(command("embed", path, *images, "--llm", "LLM"))
    data = (paths["train"], "--validation", paths["validation"])
    print(command("train-tower", *data, *images, "--tower", "TOWER"))
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
    read = parallel(partial(_read_shard, source, by), source.shards, processes=processes)
    tracked = track(read, total=len(source.shards), label="data split: reading", unit="shards")
    hash_N = np.concatenate(list(tracked))
    held_out = int(is_held_out(hash_N, validation).sum())
    if held_out in (0, len(hash_N)):
        empty = "train" if held_out else "validation"
        size = "smaller" if held_out else "larger"
        values = f"values of {by!r}" if by else "keys"
        raise ValueError(
            f"--validation {validation:g} of {len(np.unique(hash_N))} distinct {values} "
            f"leaves nothing for {empty}; choose a {size} fraction"
        )
    return hash_N


def _read_shard(source: Source, by: str, shard: Shard) -> np.ndarray:
    samples = range(shard.start, shard.start + shard.size)
    values = [_field(source, sample, by) if by else source.key(sample) for sample in samples]
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


def write_sides(source: Source, held_out_N: np.ndarray, folder: Path, workers: int = 0) -> None:
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
        tracked = track(numbers, total=len(numbers), label=f"data split: {side}", unit="rows")
        _write_rows(source, tracked, target)


def _write_tars(source: TarSource, held_out_N: np.ndarray, folder: Path, workers: int) -> None:
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
