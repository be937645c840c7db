#!/usr/bin/env python3
"""Make training and validation shards from Open Clip Art: drawings with titles, keywords and descriptions in English.

    scripts/quickstart/openclipart.py --output quickstart-output/openclipart [--size 98] [--drawings DIR]

The drawings are those of Debian's package ``openclipart-svg`` (public domain by the files' own tags, 25 MB), installed
or unpacked in ``--drawings`` (``apt-get download openclipart-svg; dpkg-deb -x openclipart-svg_*.deb DIR``). resvg draws
them on white. Left out: drawings without a title or with fewer than two keywords, titles of whole collections, blank
ones, and those whose title or a keyword is the name of a validation or test emoji. A family, which one split has whole,
is drawings with one title, or that look alike in gray.
"""

import argparse
import hashlib
import io
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import networkx
import numpy as np
from PIL import Image, ImageChops, ImageOps
from resvg_py import svg_to_bytes
from shards import EMOJI, Description, Sample, read_tar, write_tar

from llm2clip_plugin.contracts import atomic_directory

INSTALLED = Path("/usr/share/openclipart/svg")
LEFT_OUT = {"unsorted", "flags"}  # folders
COLLECTION = 8  # a title of more drawings names a collection ("Lemon SVG theme"), not what is drawn
NO_KEYWORDS = {"clip art", "clipart", "image", "media", "public domain", "svg", "png"}
ALIKE = 0.95  # correlation of two drawings that look alike
DUBLIN = "{http://purl.org/dc/elements/1.1/}"
ITEM = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"


def words(text: str) -> str:
    """Lower case, words alone: ``"Fire-ball_01"`` -> ``"fire ball"``."""
    return " ".join(word for word in re.split(r"[\W_]+", text.lower()) if word and not word.isdigit())


def describe(drawings: Path, path: Path) -> Description | None:
    """The sample's JSON, as far as one file tells; None without a title or two keywords."""
    try:
        root = ET.parse(path).getroot()
    except ET.ParseError:
        return None
    texts = {
        tag: [" ".join("".join(element.itertext()).split()) for element in root.iter(f"{DUBLIN}{tag}")]
        for tag in ("title", "description")
    }
    title = next((words(text) for text in texts["title"] if words(text)), "")
    items = [words(item.text or "") for subject in root.iter(f"{DUBLIN}subject") for item in subject.iter(ITEM)]
    keywords = [w for w in dict.fromkeys(items) if w and w not in NO_KEYWORDS and not w.startswith("hash")]
    if not title or len(keywords) < 2:
        return None
    folders = [words(part) for part in path.relative_to(drawings).parent.parts]
    about = [text for text in texts["description"] if len(text.split()) >= 3 and "@" not in text][:1]
    kinds = {"short": [title], "long": dict.fromkeys([title, *folders, *keywords, *about]), "keywords": keywords}
    captions = [{"text": ", ".join(parts), "kind": kind, "language": "en"} for kind, parts in kinds.items()]
    return {"captions": captions, "concept": title, "style": "openclipart", "keywords": keywords}


def draw(path: Path, size: int) -> Image.Image | None:
    """The drawing in the middle of a white square of ``size`` pixels; None if it cannot be drawn or is blank."""
    try:
        body = bytes(
            svg_to_bytes(svg_path=str(path), width=3 * size, dpi=96, background="#fff", skip_system_fonts=True)
        )
        drawn = Image.open(io.BytesIO(body)).convert("RGB")
    except (ValueError, OSError, RuntimeError, Image.DecompressionBombError):
        return None
    box = ImageChops.difference(drawn, Image.new("RGB", drawn.size, "white")).getbbox()  # without the margin
    if box is None or np.asarray(drawn.convert("L")).std() < 4:
        return None
    return ImageOps.pad(drawn.crop(box), (size, size), Image.Resampling.LANCZOS, color="white")


def families(titles: list[str], pictures: list[Image.Image]) -> list[str]:
    """The family of each drawing: those with one title, or that look alike (also mirrored), share it."""
    alike, first = networkx.Graph(), {}
    alike.add_edges_from((number, first.setdefault(title, number)) for number, title in enumerate(titles))
    gray = [picture.convert("L").resize((16, 16), Image.Resampling.BOX) for picture in pictures]
    look = np.stack([np.asarray(one, dtype=np.float32) for one in gray])
    look -= look.mean((1, 2), keepdims=True)  # colors, contrast and brightness do not count
    look /= np.linalg.norm(look, axis=(1, 2), keepdims=True) + 1e-6
    look_ND, mirrored_ND = (side.reshape(len(look), -1) for side in (look, look[:, :, ::-1]))
    similar_NN = np.maximum(look_ND @ look_ND.T, look_ND @ mirrored_ND.T)
    alike.add_edges_from(zip(*np.nonzero(similar_NN >= ALIKE), strict=True))
    family = {number: titles[min(group)] for group in networkx.connected_components(alike) for number in group}
    return [family[number] for number in range(len(titles))]


def read_drawings(drawings: Path, size: int) -> list[Sample]:
    """Every drawing to use, with its family and split. Raises ValueError if there is none."""
    paths = [p for p in sorted(drawings.rglob("*.svg")) if not LEFT_OUT & set(p.relative_to(drawings).parts)]
    described = {path: about for path in paths if (about := describe(drawings, path))}
    titles = Counter(about["concept"] for about in described.values())
    shards = [read_tar(EMOJI / f"{split}-noto.tar") for split in ("validation", "test")]
    emoji = [c for shard in shards for _, _, about in shard for c in about["captions"] if c["language"] == "en"]
    names = {words(c["text"]) for c in emoji if c["kind"] == "short"}  # which training must not see
    pictures: dict[Path, Image.Image] = {}
    for path, about in described.items():
        if titles[about["concept"]] <= COLLECTION and not names & {about["concept"], *about["keywords"]}:
            if picture := draw(path, size):
                pictures[path] = picture
    if not pictures:
        raise ValueError(f"{drawings} contains no SVG file with a title and keywords")
    samples = []
    of_family = families([described[path]["concept"] for path in pictures], [*pictures.values()])
    for (path, picture), family in zip(pictures.items(), of_family, strict=True):
        key = path.relative_to(drawings).with_suffix("").as_posix().replace("/", "-").replace(".", "_")
        held_out = hashlib.sha256(f"openclipart:{family}".encode()).digest()[0] % 10 == 0  # one family in ten
        body = io.BytesIO()
        picture.save(body, "png")
        more = {"family": family, "split": "validation" if held_out else "train"}
        samples.append((key, body.getvalue(), {**described[path], **more}))
    return samples


def prepare(output: Path, drawings: Path, size: int) -> None:
    """Write the shards unless they exist. Raises ValueError without drawings."""
    if output.is_dir():
        return
    unpacked = drawings / INSTALLED.relative_to("/")  # folders' names are in the captions
    samples = read_drawings(unpacked if unpacked.is_dir() else drawings, size)
    with atomic_directory(output) as temporary:
        for split in ("train", "validation"):
            write_tar(temporary / f"{split}-openclipart.tar", [one for one in samples if one[2]["split"] == split])


def main() -> None:
    """Parse the command line and write the shards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/openclipart"))
    parser.add_argument("--size", type=int, default=98, help="pixels of a side (default: 98, as the emoji)")
    parser.add_argument("--drawings", type=Path, default=INSTALLED, help="folder of the drawings")
    options = parser.parse_args()
    try:
        prepare(options.output, options.drawings, options.size)
    except ValueError as error:
        sys.exit(
            f"error: {error}; install openclipart-svg, or unpack it (dpkg-deb -x) and set --drawings to its folder"
        )


if __name__ == "__main__":
    main()
