"""What bad inputs are made of: small functions that plant a file or folder into the folder of one
case."""

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from planted_faults import World
from safetensors.torch import load_file, save_file

# (folder of the case, the world that all cases share and none changes)
Plant = Callable[[Path, World], object]


@dataclass(frozen=True)
class Case:
    """A bad input: what is planted, the command that meets it, and the first line of its error."""

    name: str
    # {t}: the folder of the case, {w}: the shared world; \\xNN: a byte that is not UTF-8
    command: str
    # the first line of the error without "error: ", or any line if status is not 2; ... stands for
    # anything
    says: str
    plants: tuple[Plant, ...] = ()
    leaves: tuple[str, ...] = ()  # files that are written before it is refused
    status: int = 2  # 0: not an error, but something that must be said


def text(name: str, content: str, encoding: str = "utf-8") -> Plant:
    """A text file."""
    return raw(name, content.encode(encoding))


def raw(name: str, content: bytes) -> Plant:
    """A file."""

    def plant(folder: Path, world: World) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return plant


def pictures(name: str = "photos", count: int = 3, captions: bool = True) -> Plant:
    """A folder of small pictures, 0.png, 1.png ..., each with a caption next to it."""

    def plant(folder: Path, world: World) -> None:
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = np.full((8, 8, 3), 40 * number, np.uint8)
            Image.fromarray(pixels).save(target / f"{number}.png")
            if captions:
                (target / f"{number}.txt").write_text(f"picture {number}")

    return plant


def copy(source: str, name: str) -> Plant:
    """A copy of a part of the shared world."""
    return lambda folder, world: shutil.copytree(world.path(source), folder / name)


def edit(name: str, **fields: Any) -> Plant:
    """Set fields of a JSON file; None removes one."""

    def plant(folder: Path, world: World) -> None:
        path = folder / name
        content = json.loads(path.read_text())
        for key, value in fields.items():
            if value is None:
                content.pop(key, None)
            else:
                content[key] = value
        path.write_text(json.dumps(content))

    return plant


def cut(name: str) -> Plant:
    """Keep the first half of a file."""

    def plant(folder: Path, world: World) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return plant


def marked(name: str) -> Plant:
    """A byte-order mark before a file, as Windows' editors write it."""

    def plant(folder: Path, world: World) -> None:
        path = folder / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    return plant


def shards_without_index(name: str) -> Plant:
    """The weights of a model in two files, without the index."""

    def plant(folder: Path, world: World) -> None:
        whole = folder / name / "model.safetensors"
        weights = load_file(whole)
        whole.unlink()
        names = sorted(weights)
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = folder / name / f"model-0000{number}-of-00002.safetensors"
            tensors = {key: weights[key] for key in part}
            save_file(tensors, file, {"format": "pt"})

    return plant


def remove(pattern: str) -> Plant:
    """Delete the files that a pattern matches; there must be some."""

    def plant(folder: Path, world: World) -> None:
        paths = list(folder.glob(pattern))
        assert paths, pattern
        for path in paths:
            path.unlink()

    return plant


def shrink(name: str, words: int) -> Plant:
    """Keep the first words of an LLM's vocabulary: fewer than its tokenizer has."""

    def plant(folder: Path, world: World) -> None:
        weights = load_file(folder / name / "model.safetensors")
        for key in weights:
            if "embed_tokens" in key or "lm_head" in key:
                weights[key] = weights[key][:words].contiguous()
        save_file(weights, folder / name / "model.safetensors", {"format": "pt"})
        edit(f"{name}/config.json", vocab_size=words)(folder, world)

    return plant


def link(name: str, target: str) -> Plant:
    """A symbolic link; {t} in its target is the folder of the case."""
    return lambda folder, world: (folder / name).symlink_to(
        target.replace("{t}", str(folder))
    )


def pipe(name: str) -> Plant:
    """A named pipe, which nobody writes to: reading it waits forever."""
    return lambda folder, world: os.mkfifo(folder / name)


def directory(name: str) -> Plant:
    return lambda folder, world: (folder / name).mkdir(parents=True)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
    )


DEEP = "[" * 100_000 + "]" * 100_000
