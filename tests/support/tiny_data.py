"""A tiny tower, captioned images in shards, and the cache of a made-up teacher: what a real run
reads, in small."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip_plugin.contracts import TeacherIdentity
from llm2clip_plugin.data.cache_file import caption_rows
from llm2clip_plugin.data.cache_writer import CacheWriter
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.vision.export import save_tower

WIDTH = 24  # of the teacher's embeddings
SHARDS = 2
SAMPLES = 24
COLOURS = {
    "red": (230, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
}


def make_tower(folder: Path, kind: str = "clip") -> Path:
    """Two layers, 32 wide, 16 pixels, random weights."""
    common = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    if kind == "dinov2":
        from transformers import Dinov2Config, Dinov2Model

        tower = Dinov2Model(Dinov2Config(mlp_ratio=2, **common))
    else:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        tower = CLIPVisionModel(CLIPVisionConfig(intermediate_size=64, **common))
    folder.mkdir(parents=True)
    # the hub's names, which every version of transformers reads
    save_tower(tower, folder)
    return folder


def write_tar(
    path: Path,
    members: Iterable[tuple[str, bytes]],
    tar_format: int = tarfile.GNU_FORMAT,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def encoded(image: Image.Image, kind: str = "JPEG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_shards(folder: Path) -> Path:
    """Pictures of a coloured half with a number of dark rows, each with a short and a long
    caption."""
    names = list(COLOURS)
    for shard in range(SHARDS):
        members = []
        for number in range(SAMPLES):
            colour = names[number % 4]
            rows = number // 4 + 6 * shard
            pixels = np.full((24, 24, 3), 255, np.uint8)
            pixels[:, 12:] = COLOURS[colour]
            pixels[: 2 * rows] //= 2
            caption = {
                "caption": f"{colour} {rows}",
                "long_caption": f"a {colour} half, {rows} dark rows",
            }
            key = f"{shard}-{number:03d}"
            members += [
                (f"{key}.png", encoded(Image.fromarray(pixels), "PNG")),
                (f"{key}.json", json.dumps(caption).encode()),
            ]
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def embed(text: str) -> torch.Tensor:
    """A made-up embedding: a sum of one random vector a word."""
    total = torch.zeros(WIDTH)
    for word in text.replace(",", "").split():
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:6], "big")
        total += torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return total


def made_up(llm: str = "made-up", *, pooling: str = "mean") -> TeacherIdentity:
    """The identity of a teacher that does not exist."""
    of_llm = {
        "llm": llm,
        "weights_sha256": hashlib.sha256(llm.encode()).hexdigest(),
        "pooling": pooling,
    }
    none = dict.fromkeys(("revision", "adapter_sha256", "prompt", "chat_template"), "")
    return TeacherIdentity(
        attention="bidirectional",
        layer=-1,
        max_tokens=512,
        width=WIDTH,
        **of_llm,
        **none,
    )


def make_cache(
    data: Path,
    *,
    llm: str = "made-up",
    embed: Callable[[str], torch.Tensor] = embed,
    identity: TeacherIdentity | None = None,
    directory: Path | None = None,
) -> Path:
    """The cache of ``data``, by default in its default place."""
    source = open_source(SourceConfig(path=str(data)))
    identity = identity or made_up(llm)
    directory = directory or data / f"embeddings-{identity.fingerprint[:12]}"
    writer = CacheWriter(directory, identity, "float16")
    for shard in source.shards:
        pairs = [source.captions(shard.start + i) for i in range(shard.size)]
        captions = [captions for _, captions in pairs]
        rows = caption_rows(captions)
        texts = [caption.text for group in captions for caption in group]
        writer.write_shard(
            shard.name,
            [key for key, _ in pairs],
            rows,
            torch.stack([embed(text) for text in texts]),
        )
    writer.finish([shard.name for shard in source.shards])
    return directory


def make_all(folder: Path, kind: str = "clip") -> Path:
    """Tower, shards and cache below ``folder``."""
    make_tower(folder / "tower", kind)
    make_cache(make_shards(folder / "data"))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_all(tmp_path_factory.mktemp("tiny"))
