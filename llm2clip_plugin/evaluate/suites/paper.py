"""The retrieval benchmarks of the paper and its authors' page, with the reported numbers."""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.errors import errors_about
from llm2clip_plugin.evaluate.suites import (
    Row,
    Suite,
    first_existing,
    read_json_lines,
    recall_by_language,
    to_captions,
)
from llm2clip_plugin.json_files import read_json_value

# Flickr30k and COCO, with English captions (the Karpathy test splits) and with Chinese ones.
KARPATHY = (
    "caption_datasets.zip of https://cs.stanford.edu/people/karpathy/deepimagesent/"
)
KARPATHY_CAPTIONS = 5  # of an image; the field drops the few sixth and seventh ones
FLICKR30K_IMAGES = "https://shannon.cs.illinois.edu/DenotationGraph/ (on request)"
FLICKR30K_CN = "flickr30k_cn_test.txt|flickr30k_cna_test.txt"
COCO_IMAGES = "http://images.cocodataset.org/zips"
COCO_CN = "https://github.com/li-xirong/coco-cn (on request)"
COCO_CN_NAMES = "coco-cn_test.txt"
COCO_CN_CAPTIONS = "imageid.human-written-caption.txt"
CHINESE_LINE = re.compile(r"((?:COCO_\w+_)?\d+)(?:\.jpg)?(?:#\S*)?[\s,]+(.*\S)")
# Images with one long caption each: ShareGPT4V-1k (of Long-CLIP), Urban-1k and DOCCI.
SHAREGPT4V = "share-captioner_coco_lcs_sam_1246k_1107.json"
SHAREGPT4V_ITEMS = 1000  # Long-CLIP excludes the first thousand from training
# characters of that file of gigabytes; a thousand items take two million
BEGINNING = 1 << 24
BETWEEN = re.compile(r"\s*[\[,]\s*(?=\{)")  # what precedes an object of an array
URBAN = "https://huggingface.co/datasets/BeichenZhang/Urban1k"
DOCCI = "https://storage.googleapis.com/docci/data"


def karpathy_test(path: Path, image: Callable[[dict[str, Any]], Path]) -> list[Row]:
    """The test split of Karpathy's JSON; ``image`` maps an item to its image file."""
    rows: list[Row] = []
    for item in read_json_value(path)["images"]:
        if item["split"] == "test":
            texts = [part["raw"] for part in item["sentences"][:KARPATHY_CAPTIONS]]
            rows.append(Row(item["filename"], image(item), to_captions(texts)))
    return rows


def read_flickr30k(folder: Path) -> list[Row]:
    """``dataset_flickr30k.json`` and ``flickr30k-images/``."""
    return karpathy_test(
        folder / "dataset_flickr30k.json",
        lambda item: folder / "flickr30k-images" / item["filename"],
    )


def read_coco(folder: Path) -> list[Row]:
    """``dataset_coco.json`` and ``val2014/``."""
    return karpathy_test(
        folder / "dataset_coco.json",
        lambda item: folder / item["filepath"] / item["filename"],
    )


def chinese_captions(path: Path) -> dict[str, tuple[Caption, ...]]:
    """Image -> captions. Lines: ``IMAGE.jpg,CAPTION``, ``IMAGE#0<TAB>CAPTION``, ``IMAGE CAPTION``;
    else headings."""
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for line in path.read_text("utf-8-sig").splitlines():
        if match := CHINESE_LINE.match(line):
            texts[match[1]].append(match[2])
    if not texts:
        raise ValueError(
            f"unexpected layout of {path}: no line starts with an image's number"
        )
    return {
        image: to_captions(of_image, language="zh") for image, of_image in texts.items()
    }


def read_flickr30k_cn(folder: Path) -> list[Row]:
    """Flickr30k-CN's or Flickr30k-CNA's file of the test split."""
    candidates = [folder / name for name in FLICKR30K_CN.split("|")]
    path = next(path for path in candidates if path.is_file())
    images = first_existing(
        folder / "flickr30k-images", folder.parent / "flickr30k" / "flickr30k-images"
    )
    rows: list[Row] = []
    for stem, captions in chinese_captions(path).items():
        rows.append(Row(stem, images / f"{stem}.jpg", captions))
    return rows


def read_coco_cn(folder: Path) -> list[Row]:
    """``coco-cn_test.txt`` has the names of the images."""
    captions = chinese_captions(folder / COCO_CN_CAPTIONS)
    rows = []
    for name in (folder / COCO_CN_NAMES).read_text("utf-8").split():
        split = "val2014" if "val2014" in name else "train2014"
        images = first_existing(folder / split, folder.parent / "coco" / split)
        rows.append(Row(name, images / f"{name}.jpg", captions.get(name, ())))
    return rows


def read_sharegpt4v(folder: Path) -> list[Row]:
    """The JSON's first items; images below ``data/``, or next to the JSON."""
    path = folder / SHAREGPT4V
    images = first_existing(folder / "data", folder)
    rows: list[Row] = []
    offset = 0
    with (
        errors_about(path, fix="download it again"),
        path.open(encoding="utf-8") as file,
    ):
        text = file.read(BEGINNING)
        while len(rows) < SHAREGPT4V_ITEMS and (start := BETWEEN.match(text, offset)):
            item, offset = json.JSONDecoder().raw_decode(text, start.end())
            captions = to_captions([item["conversations"][1]["value"]], "long")
            rows.append(Row(item["image"], images / item["image"], captions))
    return rows


def read_urban(folder: Path) -> list[Row]:
    """``image/N.jpg`` with ``caption/N.txt``, in the order of N."""

    def by_number(file: Path) -> tuple[int, str]:
        return len(file.stem), file.stem

    rows: list[Row] = []
    for file in sorted((folder / "caption").glob("*.txt"), key=by_number):
        captions = to_captions([file.read_text("utf-8")], "long")
        image = folder / "image" / f"{file.stem}.jpg"
        rows.append(Row(file.stem, image, captions))
    return rows


def read_docci(folder: Path) -> list[Row]:
    """The test items of ``docci_descriptions.jsonlines``, with ``images/``."""
    rows: list[Row] = []
    for item in read_json_lines(folder / "docci_descriptions.jsonlines"):
        if item["split"] != "test":
            continue
        key = item["example_id"]
        image = folder / "images" / item["image_file"]
        captions = to_captions([item["description"]], "long")
        rows.append(Row(key, image, captions))
    return rows


def read_xm3600(folder: Path) -> list[Row]:
    """``captions.jsonl`` (one field per language) with ``images/KEY.jpg``; every caption of every
    language."""
    rows = []
    for item in read_json_lines(folder / "captions.jsonl"):
        captions: list[Caption] = []
        for language, value in item.items():
            if isinstance(value, dict) and "caption" in value:
                for text in value["caption"]:
                    captions.append(Caption(text, "short", language))
        key = item["image/key"]
        rows.append(Row(key, folder / "images" / f"{key}.jpg", tuple(captions)))
    return rows


def english(*scores: tuple[float, float]) -> dict[str, Any]:
    """The table of suites with English captions, and the paper's scores of its five towers."""
    clip = "CLIP-L-336"
    eva = "EVA02-L-336"
    trained = "LLM2CLIP (15 M)"
    rows = (
        clip,
        f"{clip} + {trained}",
        eva,
        f"{eva} + {trained}",
        "EVA02-L-224, LLM without CC",
    )
    return {
        "table": "Retrieval, English",
        "paper": dict(zip(rows, scores, strict=True)),
    }


def cross_lingual(*scores: tuple[float, float]) -> dict[str, Any]:
    """The table of suites with other languages, and the page's scores of its two towers."""
    paper = dict(zip(("EVA02-L-224", "EVA02-L-224 + LLM2CLIP"), scores, strict=True))
    return {
        "table": "Retrieval, cross-lingual (trained on English only)",
        "paper": paper,
        "paper_source": "site",
    }


SUITE = [
    Suite(
        name="flickr30k",
        requires={
            "dataset_flickr30k.json": KARPATHY,
            "flickr30k-images": FLICKR30K_IMAGES,
        },
        read=read_flickr30k,
        images=1000,
        **english((87.7, 67.0), (91.2, 82.1), (89.6, 78.0), (93.9, 83.8), (87.9, 75.6)),
    ),
    Suite(
        name="coco",
        requires={
            "dataset_coco.json": KARPATHY,
            "val2014": f"{COCO_IMAGES}/val2014.zip",
        },
        read=read_coco,
        images=5000,
        **english((58.0, 37.1), (65.5, 53.6), (64.2, 47.9), (68.7, 55.7), (56.7, 41.8)),
    ),
    Suite(
        name="sharegpt4v-1k",
        requires={
            SHAREGPT4V: "https://huggingface.co/datasets/Lin-Chen/ShareGPT4V",
            "sam|data/sam": (
                "SA-1B: the images that the ShareGPT4V page lists, as sam/images/sa_*.jpg"
            ),
        },
        read=read_sharegpt4v,
        images=SHAREGPT4V_ITEMS,
        **english((86.2, 84.0), (98.1, 98.4), (91.5, 89.4), (98.8, 99.2), (55.1, 46.1)),
    ),
    Suite(
        name="urban-1k",
        requires={"image": URBAN, "caption": URBAN},
        read=read_urban,
        images=1000,
        **english((72.8, 57.0), (90.3, 93.2), (76.6, 70.0), (89.5, 94.2), (37.2, 35.1)),
    ),
    Suite(
        name="docci",
        requires={
            "docci_descriptions.jsonlines": f"{DOCCI}/docci_descriptions.jsonlines",
            "images": f"{DOCCI}/docci_images.tar.gz",
        },
        read=read_docci,
        images=5000,
        **english((67.4, 65.7), (87.7, 89.0), (74.7, 76.4), (89.2, 91.3), (39.3, 32.3)),
    ),
    Suite(
        name="flickr30k-cn",
        requires={
            FLICKR30K_CN: "https://github.com/li-xirong/cross-lingual-cap, or Flickr30k-CNA of https://zero.so.com",
            "flickr30k-images|../flickr30k/flickr30k-images": FLICKR30K_IMAGES,
        },
        read=read_flickr30k_cn,
        images=1000,
        **cross_lingual((4.4, 0.9), (90.6, 75.6)),
    ),
    Suite(
        name="coco-cn",
        requires={COCO_CN_NAMES: COCO_CN, COCO_CN_CAPTIONS: COCO_CN}
        | {
            f"{split}|../coco/{split}": f"{COCO_IMAGES}/{split}.zip"
            for split in ("val2014", "train2014")
        },
        read=read_coco_cn,
        images=1000,
        **cross_lingual((2.6, 1.0), (72.0, 70.1)),
    ),
    Suite(
        name="xm3600",
        requires={
            "captions.jsonl": "https://google.github.io/crossmodal-3600/web-data/captions.zip",
            "images": "https://open-images-dataset.s3.amazonaws.com/crossmodal-3600/images.tgz",
        },
        read=read_xm3600,
        measure=recall_by_language,
        images=3600,
        **cross_lingual((14.0, 8.0), (68.3, 56.0)),
    ),
]
