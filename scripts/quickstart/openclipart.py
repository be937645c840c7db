#!/usr/bin/env python3
"""Make training and validation shards from Open Clip Art: drawings with titles, keywords and descriptions in English.

    scripts/quickstart/openclipart.py --output quickstart-output/openclipart [--size 98] [--drawings DIR]

The drawings are Debian's package ``openclipart-svg`` (public domain by the files' own tags, 25 MB). They are taken from
``--drawings``, else from /usr/share/openclipart/svg, else downloaded from the mirror that apt is configured with; root
is not needed. resvg draws them on white. Left out, and counted: drawings without a title or with fewer than two
keywords, titles of whole collections, blank ones, and those whose title or a keyword is the name of a validation or
test emoji. A family, which one split has whole, is drawings with one title, or that look alike in gray.
"""

import argparse
import hashlib
import io
import re
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import networkx
import numpy as np
from PIL import Image, ImageChops, ImageOps
from resvg_py import svg_to_bytes
from shards import EMOJI, Description, Sample, read_tar, write_tar
from tuxpaint import download

from llm2clip_plugin.console import track
from llm2clip_plugin.contracts import atomic_directory

PACKAGE = "openclipart-svg"
INSTALLED = Path("/usr/share/openclipart/svg")
LEFT_OUT = {"unsorted", "flags"}  # folders
COLLECTION = 8  # a title of more drawings names a collection ("Lemon SVG theme"), not what is drawn
NO_KEYWORDS = {"clip art", "clipart", "image", "media", "public domain", "svg", "png"}
VALIDATION = 10  # one family in so many
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
    title = next((words(text) for text in _texts(root, "title") if words(text)), "")
    items = [item.text or "" for subject in root.iter(f"{DUBLIN}subject") for item in subject.iter(ITEM)]
    found = [word for word in dict.fromkeys(words(item) for item in items) if word and word not in NO_KEYWORDS]
    keywords = [word for word in found if not word.startswith("hash")]
    if not title or len(keywords) < 2:
        return None
    folders = [words(part) for part in path.relative_to(drawings).parent.parts]
    about = next((text for text in _texts(root, "description") if len(text.split()) >= 3 and "@" not in text), "")
    long = ", ".join(dict.fromkeys([title, *folders, *keywords, *([about] if about else [])]))
    texts = {"short": title, "long": long, "keywords": ", ".join(keywords)}
    captions = [{"text": text, "kind": kind, "language": "en"} for kind, text in texts.items()]
    return {"captions": captions, "concept": title, "style": "openclipart"}


def _texts(root: ET.Element, tag: str) -> Iterator[str]:
    """The texts of the elements with a Dublin Core tag, white space collapsed."""
    return (" ".join("".join(element.itertext()).split()) for element in root.iter(f"{DUBLIN}{tag}"))


def keywords_of(about: Description) -> list[str]:
    """The keywords of a description."""
    return next(c["text"].split(", ") for c in about["captions"] if c["kind"] == "keywords")


def draw(path: Path, size: int) -> Image.Image | None:
    """The drawing in the middle of a white square of ``size`` pixels; None if it cannot be drawn or is blank."""
    try:
        body = bytes(svg_to_bytes(svg_path=str(path), width=3 * size, dpi=96, skip_system_fonts=True))
        with Image.open(io.BytesIO(body)) as opened:
            picture = opened.convert("RGBA")
    except (ValueError, OSError, RuntimeError, Image.DecompressionBombError):
        return None
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    drawn = page.convert("RGB")
    box = ImageChops.difference(drawn, Image.new("RGB", drawn.size, "white")).getbbox()  # without the margin
    if box is None or np.asarray(drawn.convert("L")).std() < 4:
        return None
    return ImageOps.pad(drawn.crop(box), (size, size), Image.Resampling.LANCZOS, color="white")


def signature(picture: Image.Image) -> np.ndarray:
    """(256,) unit vector of the gray 16 x 16 thumbnail around its mean: colors, contrast and brightness don't count."""
    gray_D = np.asarray(picture.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel()
    centered_D = gray_D - gray_D.mean()
    return centered_D / (np.linalg.norm(centered_D) + 1e-6)


def families(samples: list[tuple[str, Image.Image]]) -> list[str]:
    """The family of each (title, drawing): those with one title, or that look alike (also mirrored), share it."""
    alike = networkx.Graph()
    alike.add_nodes_from(range(len(samples)))
    first: dict[str, int] = {}
    alike.add_edges_from((number, first.setdefault(title, number)) for number, (title, _) in enumerate(samples))
    look_ND = np.stack([signature(picture) for _, picture in samples])
    mirrored_ND = look_ND.reshape(-1, 16, 16)[:, :, ::-1].reshape(-1, 256)
    alike.add_edges_from(
        zip(*np.nonzero(np.maximum(look_ND @ look_ND.T, look_ND @ mirrored_ND.T) >= ALIKE), strict=True)
    )
    family = {number: samples[min(group)][0] for group in networkx.connected_components(alike) for number in group}
    return [family[number] for number in range(len(samples))]


def reserved() -> set[str]:
    """The names of validation and test emoji, which training must not see."""
    shards = [EMOJI / f"{split}-noto.tar" for split in ("validation", "test")]
    captions = [c for shard in shards for _, _, about in read_tar(shard) for c in about["captions"]]
    return {words(c["text"]) for c in captions if c["kind"] == "short" and c["language"] == "en"}


def read_drawings(drawings: Path, size: int, left_out: Counter[str]) -> list[Sample]:
    """Every drawing to use, with its family and split. Raises ValueError if there is none."""
    paths = [p for p in sorted(drawings.rglob("*.svg")) if not LEFT_OUT & set(p.relative_to(drawings).parts)]
    described = {path: about for path in paths if (about := describe(drawings, path))}
    left_out["without a title or two keywords"] = len(paths) - len(described)
    titles, names = Counter(about["concept"] for about in described.values()), reserved()
    found: list[tuple[Path, Image.Image, Description]] = []
    for path, about in track(described.items(), total=len(described), label="drawings", unit="drawings"):
        picture = None
        if titles[about["concept"]] > COLLECTION:
            left_out["of collections"] += 1
        elif names & {about["concept"], *keywords_of(about)}:
            left_out["named as a validation or test emoji"] += 1
        elif (picture := draw(path, size)) is None:
            left_out["blank, or not drawable"] += 1
        if picture is not None:
            found.append((path, picture, about))
    if not found:
        raise ValueError(f"{drawings} contains no SVG file with a title and keywords")
    samples = []
    named = [(about["concept"], picture) for _, picture, about in found]
    for (path, picture, about), family in zip(found, families(named), strict=True):
        key = path.relative_to(drawings).with_suffix("").as_posix().replace("/", "-").replace(".", "_")
        samples.append((key, png(picture), {**about, "family": family, "split": split_of(family)}))
    return samples


def png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    body = io.BytesIO()
    picture.save(body, "png")
    return body.getvalue()


def split_of(family: str) -> str:
    """By the family's hash, the same on every machine."""
    digest = hashlib.sha256(f"openclipart:{family}".encode()).digest()
    return "validation" if digest[0] % VALIDATION == 0 else "train"


def prepare(output: Path, drawings: Path | None, size: int) -> None:
    """Write the shards unless they exist. Raises OSError or ValueError without drawings."""
    if output.is_dir():
        return
    left_out: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        found = drawings or (INSTALLED if INSTALLED.is_dir() else None)
        if found is None:
            print(f"downloading {PACKAGE} (25 MB, public domain)", file=sys.stderr)
            found = download(PACKAGE, Path(scratch)) / INSTALLED.relative_to("/")
        samples = read_drawings(found, size, left_out)
    with atomic_directory(output) as temporary:
        for split in ("train", "validation"):
            write_tar(temporary / f"{split}-openclipart.tar", list(_of(samples, split)))
    print(f"{output}: {Counter(about['split'] for _, _, about in samples)}, left out {dict(left_out)}", file=sys.stderr)


def _of(samples: Iterable[Sample], split: str) -> Iterator[Sample]:
    return (sample for sample in samples if sample[2]["split"] == split)


def main() -> None:
    """Parse the command line and write the shards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/openclipart"))
    parser.add_argument("--size", type=int, default=98, help="pixels of a side (default: 98, as the emoji)")
    parser.add_argument("--drawings", type=Path, help="folder of the drawings, if they are on this machine")
    options = parser.parse_args()
    try:
        prepare(options.output, options.drawings, options.size)
    except (OSError, ValueError) as error:
        sys.exit(f"error: no Open Clip Art: {error}. Install {PACKAGE}, or unpack it and give --drawings its folder")


if __name__ == "__main__":
    main()
