"""Flickr30k and COCO, with English captions (the Karpathy test splits) and with Chinese ones."""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.evaluate.suites import Row, Suite, expected_layout, first_existing, read_json, to_captions

KARPATHY = "caption_datasets.zip of https://cs.stanford.edu/people/karpathy/deepimagesent/"
KARPATHY_CAPTIONS = 5  # of an image; the field drops the few sixth and seventh ones
FLICKR30K_IMAGES = "https://shannon.cs.illinois.edu/DenotationGraph/ (on request)"
FLICKR30K_CN = "flickr30k_cn_test.txt|flickr30k_cna_test.txt"
COCO_IMAGES = "http://images.cocodataset.org/zips"
COCO_CN = "https://github.com/li-xirong/coco-cn (on request)"
COCO_CN_NAMES, COCO_CN_CAPTIONS = "coco-cn_test.txt", "imageid.human-written-caption.txt"
CHINESE_LINE = re.compile(r"((?:COCO_\w+_)?\d+)(?:\.jpg)?(?:#\S*)?[\s,]+(.*\S)")


def karpathy_test(path: Path, image: Callable[[dict[str, Any]], Path]) -> list[Row]:
    """The test split of Karpathy's JSON; ``image`` maps an item to its image file."""
    body = read_json(path)
    with expected_layout(path):
        items = [item for item in body["images"] if item["split"] == "test"]
        texts = [[part["raw"] for part in item["sentences"][:KARPATHY_CAPTIONS]] for item in items]
        return [Row(item["filename"], image(item), to_captions(raw)) for item, raw in zip(items, texts, strict=True)]


def read_flickr30k(folder: Path) -> list[Row]:
    """``dataset_flickr30k.json`` and ``flickr30k-images/``."""
    return karpathy_test(folder / "dataset_flickr30k.json", lambda item: folder / "flickr30k-images" / item["filename"])


def read_coco(folder: Path) -> list[Row]:
    """``dataset_coco.json`` and ``val2014/``."""
    return karpathy_test(folder / "dataset_coco.json", lambda item: folder / item["filepath"] / item["filename"])


def chinese_captions(path: Path) -> dict[str, tuple[Caption, ...]]:
    """Image -> captions. Lines: ``IMAGE.jpg,CAPTION``, ``IMAGE#0<TAB>CAPTION``, ``IMAGE CAPTION``; else headings."""
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for line in path.read_text("utf-8-sig").splitlines():
        if match := CHINESE_LINE.match(line):
            texts[match[1]].append(match[2])
    if not texts:
        raise ValueError(f"unexpected layout of {path}: no line starts with an image's number")
    return {image: to_captions(of_image, language="zh") for image, of_image in texts.items()}


def read_flickr30k_cn(folder: Path) -> list[Row]:
    """Flickr30k-CN's or Flickr30k-CNA's file of the test split."""
    path = next(folder / name for name in FLICKR30K_CN.split("|") if (folder / name).is_file())
    images = first_existing(folder / "flickr30k-images", folder.parent / "flickr30k" / "flickr30k-images")
    return [Row(stem, images / f"{stem}.jpg", captions) for stem, captions in chinese_captions(path).items()]


def read_coco_cn(folder: Path) -> list[Row]:
    """``coco-cn_test.txt`` has the names of the images."""
    captions, rows = chinese_captions(folder / COCO_CN_CAPTIONS), []
    for name in (folder / COCO_CN_NAMES).read_text("utf-8").split():
        split = "val2014" if "val2014" in name else "train2014"
        images = first_existing(folder / split, folder.parent / "coco" / split)
        rows.append(Row(name, images / f"{name}.jpg", captions.get(name, ())))
    return rows


SUITE = [
    Suite(
        name="flickr30k",
        title="Flickr30k (Karpathy test)",
        requires={"dataset_flickr30k.json": KARPATHY, "flickr30k-images": FLICKR30K_IMAGES},
        read=read_flickr30k,
        images=1000,
        order=1,
        table="Retrieval, English",
        paper={
            "CLIP-L-336": (87.7, 67.0),
            "CLIP-L-336 + LLM2CLIP (15 M)": (91.2, 82.1),
            "EVA02-L-336": (89.6, 78.0),
            "EVA02-L-336 + LLM2CLIP (15 M)": (93.9, 83.8),
            "EVA02-L-224, LLM without CC": (87.9, 75.6),
        },
    ),
    Suite(
        name="coco",
        title="COCO (Karpathy test, 5k)",
        requires={"dataset_coco.json": KARPATHY, "val2014": f"{COCO_IMAGES}/val2014.zip"},
        read=read_coco,
        images=5000,
        order=2,
        table="Retrieval, English",
        paper={
            "CLIP-L-336": (58.0, 37.1),
            "CLIP-L-336 + LLM2CLIP (15 M)": (65.5, 53.6),
            "EVA02-L-336": (64.2, 47.9),
            "EVA02-L-336 + LLM2CLIP (15 M)": (68.7, 55.7),
            "EVA02-L-224, LLM without CC": (56.7, 41.8),
        },
    ),
    Suite(
        name="flickr30k-cn",
        title="Flickr30k-CN (test)",
        requires={
            FLICKR30K_CN: "https://github.com/li-xirong/cross-lingual-cap, or Flickr30k-CNA of https://zero.so.com",
            "flickr30k-images|../flickr30k/flickr30k-images": FLICKR30K_IMAGES,
        },
        read=read_flickr30k_cn,
        images=1000,
        order=6,
        table="Retrieval, cross-lingual (trained on English only)",
        paper={"EVA02-L-224": (4.4, 0.9), "EVA02-L-224 + LLM2CLIP": (90.6, 75.6)},
        paper_source="site",
    ),
    Suite(
        name="coco-cn",
        title="COCO-CN (test)",
        requires={
            COCO_CN_NAMES: COCO_CN,
            COCO_CN_CAPTIONS: COCO_CN,
            "val2014|../coco/val2014": f"{COCO_IMAGES}/val2014.zip",
            "train2014|../coco/train2014": f"{COCO_IMAGES}/train2014.zip",
        },
        read=read_coco_cn,
        images=1000,
        order=7,
        table="Retrieval, cross-lingual (trained on English only)",
        paper={"EVA02-L-224": (2.6, 1.0), "EVA02-L-224 + LLM2CLIP": (72.0, 70.1)},
        paper_source="site",
    ),
]
