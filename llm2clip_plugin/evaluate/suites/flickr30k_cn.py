"""Flickr30k-CN, the test split: 1,000 images of Flickr30k with Chinese captions."""

import re
from pathlib import Path

from llm2clip_plugin.evaluate.suites import FLICKR30K_IMAGES, Row, Suite, first_existing, to_captions

FILES = ("flickr30k_cn_test.txt", "flickr30k_cna_test.txt")
LINE = re.compile(r"(\d+)(?:\.jpg)?(?:#\S*)?[\s,]+(.*)")


def read(folder: Path) -> list[Row]:
    """Lines ``IMAGE.jpg,CAPTION``, ``IMAGE.jpg#0#zhc<TAB>CAPTION``, or ``IMAGE CAPTION`` (Flickr30k-CNA)."""
    path = next(folder / name for name in FILES if (folder / name).is_file())
    images = first_existing(folder / "flickr30k-images", folder.parent / "flickr30k" / "flickr30k-images")
    captions: dict[str, list[str]] = {}
    for line in path.read_text("utf-8-sig").splitlines():
        if (match := LINE.match(line)) and match[2].strip():  # else a heading
            captions.setdefault(match[1], []).append(match[2].strip())
    if not captions:
        raise ValueError(f"unexpected layout of {path}: no line starts with an image's number")
    return [Row(stem, images / f"{stem}.jpg", to_captions(texts, language="zh")) for stem, texts in captions.items()]


SUITE = Suite(
    name="flickr30k-cn",
    title="Flickr30k-CN (test)",
    requires={
        "|".join(FILES): "https://github.com/li-xirong/cross-lingual-cap, or Flickr30k-CNA of https://zero.so.com",
        "flickr30k-images|../flickr30k/flickr30k-images": FLICKR30K_IMAGES,
    },
    read=read,
    images=1000,
    order=6,
    table="Retrieval, cross-lingual (trained on English only)",
    paper={"EVA02-L-224": (4.4, 0.9), "EVA02-L-224 + LLM2CLIP": (90.6, 75.6)},
    paper_source="site",
)
