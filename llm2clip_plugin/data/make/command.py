"""``llm2clip data make FOLDER|TABLE --output DIR``: WebDataset tars of pictures and captions, whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from llm2clip_plugin.commands import command
from llm2clip_plugin.contracts import atomic_directory, size_text
from llm2clip_plugin.data.decode import BrokenImage, has_transparency, load, open_header
from llm2clip_plugin.data.make.items import Item, list_items
from llm2clip_plugin.data.make.options import COMMAND, MakeConfig
from llm2clip_plugin.data.pool import cores, parallel
from llm2clip_plugin.outside.values import printable
from llm2clip_plugin.progress import track

STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # copied as they are; others become PNG
LEFT_OUT = "left-out.jsonl"  # in the output: {"image", "reason"} of each picture that is in no tar


@dataclass(frozen=True)
class Picture:
    """A picture as it goes into a tar."""

    data: bytes
    extension: str
    sha256: str  # of the file
    transparent: bool


@dataclass
class Made:
    """What was written."""

    samples: int = 0
    captions: int = 0
    size: int = 0  # bytes of pictures
    transparent: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)  # (image, reason)
    keys: set[str] = field(default_factory=set)
    copies: dict[str, str] = field(default_factory=dict)  # SHA-256 of a picture -> its name


def main(argv: list[str]) -> int:
    """Write the tars and print what is in them; exit status 0."""
    config = COMMAND.parse(argv)
    made = make_data(config)
    print("\n".join(_report(config, made)), flush=True)
    return 0


def make_data(config: MakeConfig) -> Made:
    """Write ``config.output``: tars, and a list of what was left out.

    Raises FileExistsError if it exists, FileNotFoundError without data, ValueError if nothing can be used.
    """
    output = Path(config.output)
    if not config.overwrite and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not empty; choose another --output or pass --overwrite")
    items = list_items(config)
    with atomic_directory(output, replace=config.overwrite) as folder:
        made = _write(config, items, folder)
        if not made.samples:
            first, reason = made.left_out[0]
            fix = "; write captions to .txt files of the same names, or add --file-names"
            reason += fix * (reason == "no caption")
            raise ValueError(f"none of the {len(items)} files in {config.path} can be used: {first}: {reason}")
        lines = [json.dumps({"image": image, "reason": reason}, ensure_ascii=False) for image, reason in made.left_out]
        (folder / LEFT_OUT).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="replace")
    return made


def _write(config: MakeConfig, items: list[Item], folder: Path) -> Made:
    made, tar, shard = Made(), None, 0
    try:
        for item, picture in zip(items, _pictures(config, items), strict=True):
            if isinstance(picture, Picture) and picture.sha256 in made.copies:
                picture = f"copy: of {made.copies[picture.sha256]}"
            if isinstance(picture, str):
                made.left_out.append((item.name, picture))
                continue
            if tar is None or tar.offset > config.shard_mb * 1_000_000:
                if tar is not None:
                    tar.close()
                tar, shard = tarfile.open(folder / f"{shard:05d}.tar", "w"), shard + 1
            made.copies[picture.sha256] = item.name
            _add(tar, _unique(item.key, made.keys), picture, item)
            made.samples += 1
            made.captions += len(item.captions)
            made.size += len(picture.data)
            made.transparent += picture.transparent
    finally:
        if tar is not None:
            tar.close()
    return made


def _pictures(config: MakeConfig, items: list[Item]) -> Iterator[Picture | str]:
    """Each item's picture, or why it has none."""
    job = partial(read_picture, config.background)
    processes = min(config.workers or cores(), len(items) // 64)
    pictures = parallel(job, items, processes=processes)
    yield from track(pictures, total=len(items), label="data make", unit="pictures")


def read_picture(background: str, item: Item) -> Picture | str:
    """The picture of an item, decoded once; on ``background`` if it is transparent. A text says why there is none."""
    if item.problem:
        return item.problem
    try:
        data = item.path.read_bytes()
        image = open_header(data)
        transparent, kind = has_transparency(image), STORED.get(image.format or "")
        flat = load(image)
    except BrokenImage as error:
        return f"unreadable: {error}"
    except OSError as error:
        return f"no file: {item.path}" if isinstance(error, FileNotFoundError) else f"unreadable: {error.strerror}"
    sha256 = hashlib.sha256(data).hexdigest()
    if transparent and background:
        flat = Image.new("RGBA", image.size, background)
        flat.alpha_composite(image.convert("RGBA"))
        flat, kind = flat.convert("RGB"), None
    if kind is None:
        buffer = io.BytesIO()
        (image.convert("RGBA") if transparent and not background else flat).save(buffer, "PNG")
        data = buffer.getvalue()
    return Picture(data, kind or "png", sha256, transparent and not background)


def _unique(key: str, keys: set[str]) -> str:
    """The key, or with a number if there is one: a.jpg and a.png are two samples."""
    number, new = 2, key
    while new in keys:
        number, new = number + 1, f"{key}-{number}"
    keys.add(new)
    return new


def _add(tar: tarfile.TarFile, key: str, picture: Picture, item: Item) -> None:
    fields = {**item.meta, "captions": item.captions}
    body = json.dumps(fields, ensure_ascii=False, default=str).encode("utf-8", "replace")
    for extension, data in ((picture.extension, picture.data), ("json", body)):
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def _report(config: MakeConfig, made: Made) -> list[str]:
    lines = [f"{config.output}: {made.samples:,} samples, {made.captions:,} captions, {size_text(made.size)}"]
    reasons: dict[str, list[str]] = {}
    for image, reason in made.left_out:
        kind, _, detail = reason.partition(": ")
        reasons.setdefault(kind, []).append(f"{image} ({detail})" if detail else image)
    if made.left_out:
        lines.append(f"left out: {len(made.left_out):,}, all in {os.path.join(config.output, LEFT_OUT)}")
    for reason, images in reasons.items():
        more = f" and {len(images) - config.show:,} more" if len(images) > config.show else ""
        lines.append(f"  {reason}: {len(images):,}: {printable(', '.join(images[: config.show]))}{more}")
    if made.transparent:
        lines.append(
            f"note: {made.transparent:,} pictures are transparent, which training shows on black; --background white "
            "puts them on white"
        )
    return [*lines, command("data", "check", config.output)]
