"""``llm2clip data make FOLDER|TABLE``: tars of pictures and captions, written whole or not at
all."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from llm2clip_plugin.atomic import size_text
from llm2clip_plugin.data.listing import (
    Item,
    in_folder,
    in_table,
    join_copies,
    words_of_name,
)
from llm2clip_plugin.data.samples import (
    DEFAULT_FIELDS,
    cores,
    holds_words,
    parallel,
    parse_fields,
    read_captions,
)
from llm2clip_plugin.data.tables import PICTURES
from llm2clip_plugin.folders import MAKE_FOLDER, output_folder
from llm2clip_plugin.options import Command, command, setting
from llm2clip_plugin.outside import MAX_IMAGE, read_regular
from llm2clip_plugin.pictures import has_16_bits, has_transparency, load, open_header
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
            raise ValueError(
                f"background is {self.background!r}, expected white, gray or black"
            )
        folders = [
            Path(folder).resolve() for folder in (self.path, self.images) if folder
        ]
        if any(
            folder.is_relative_to(Path(self.output).resolve()) for folder in folders
        ):
            raise ValueError(
                f"--output {self.output} contains the pictures; choose another folder"
            )


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
        lines = ""
        for image, reason in left_out:
            row = {"image": image, "reason": reason}
            lines += json.dumps(row, ensure_ascii=False) + "\n"
        (folder / LEFT_OUT).write_text(lines, encoding="utf-8", errors="replace")
    samples = len(items) - len(left_out)
    captions = sum(len(item.captions) for item in items if not item.problem)
    print(
        f"{config.output}: {samples:,} samples, {captions:,} captions, {size_text(size)}"
    )
    if joined:
        print(
            f"joined from exact copies: {joined:,} {'caption' if joined == 1 else 'captions'}"
        )
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
            path,
            folder,
            names,
            config.image_field,
            needs_captions=not config.file_names,
        )
    else:
        raise ValueError(
            f"{path} is neither a folder of pictures nor a table ({' '.join(TABLES)})"
        )
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
        meta = {name: value for name, value in row.items() if name not in used}
        item.meta = meta | item.meta
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
        if has_16_bits(image):  # most readers would take it for white
            extension = ""
    except ValueError as error:  # BrokenImage, too
        return f"unreadable: {error}"
    except FileNotFoundError:
        return f"no file: {item.path}"
    except OSError as error:
        return f"unreadable: {error.strerror}"
    if transparent and (background or not extension):
        flat = image.convert("RGBA")
    if transparent and background:
        flat = Image.alpha_composite(
            Image.new("RGBA", image.size, background), flat
        ).convert("RGB")
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
    pictures = parallel(
        partial(read_picture, config.background), items, processes=processes
    )
    with ExitStack() as opened:
        tracked = track(pictures, total=len(items), label="data make", unit="pictures")
        for item, picture in zip(items, tracked, strict=True):
            if isinstance(picture, str):
                item.problem = picture
                continue
            if tar is None or tar.offset > SHARD_BYTES:
                opened.close()
                tar = opened.enter_context(
                    tarfile.open(folder / f"{shard:05d}.tar", "w")
                )
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
