"""Images with one long caption each: ShareGPT4V-1k (of Long-CLIP), Urban-1k and DOCCI."""

import json
import re
from pathlib import Path
from typing import Any

from llm2clip_plugin.evaluate.suites import Row, Suite, expected_layout, read_json_lines, to_captions
from llm2clip_plugin.files import errors_about

SHAREGPT4V = "share-captioner_coco_lcs_sam_1246k_1107.json"
ITEMS = 1000  # Long-CLIP excludes the first thousand from training
BEGINNING = 1 << 24  # characters; a thousand items take two million
BETWEEN = re.compile(r"\s*[\[,]\s*(?=\{)")  # what precedes an object of an array
URBAN = "https://huggingface.co/datasets/BeichenZhang/Urban1k"
DOCCI = "https://storage.googleapis.com/docci/data"


def read_sharegpt4v(folder: Path) -> list[Row]:
    """The JSON's first items; images below ``data/``, or next to the JSON."""
    path = folder / SHAREGPT4V
    images = folder / "data" if (folder / "data").is_dir() else folder
    with expected_layout(path):
        return [
            Row(item["image"], images / item["image"], to_captions([item["conversations"][1]["value"]], "long"))
            for item in first_items(path, ITEMS)
        ]


def first_items(path: Path, count: int) -> list[Any]:
    """The first ``count`` items of a JSON array, from the first ``BEGINNING`` characters of a file of gigabytes."""
    items, place = [], 0
    with errors_about(path, fix="download it again"), path.open(encoding="utf-8") as file:
        text = file.read(BEGINNING)
        while len(items) < count and (start := BETWEEN.match(text, place)):
            item, place = json.JSONDecoder().raw_decode(text, start.end())
            items.append(item)
    if not items:
        raise ValueError(f"{path} is not a JSON array of objects")
    return items


def read_urban(folder: Path) -> list[Row]:
    """``image/N.jpg`` with ``caption/N.txt``, in the order of N."""
    texts = sorted((folder / "caption").glob("*.txt"), key=lambda file: (len(file.stem), file.stem))
    return [
        Row(file.stem, folder / "image" / f"{file.stem}.jpg", to_captions([file.read_text("utf-8")], "long"))
        for file in texts
    ]


def read_docci(folder: Path) -> list[Row]:
    """The test items of ``docci_descriptions.jsonlines``, with ``images/``."""
    path = folder / "docci_descriptions.jsonlines"
    with expected_layout(path):
        return [
            Row(item["example_id"], folder / "images" / item["image_file"], to_captions([item["description"]], "long"))
            for item in read_json_lines(path)
            if item["split"] == "test"
        ]


SUITE = [
    Suite(
        name="sharegpt4v-1k",
        title="ShareGPT4V-1k",
        requires={
            SHAREGPT4V: "https://huggingface.co/datasets/Lin-Chen/ShareGPT4V",
            "sam|data/sam": "SA-1B: the images that the ShareGPT4V page lists, as sam/images/sa_*.jpg",
        },
        read=read_sharegpt4v,
        images=ITEMS,
        order=3,
        table="Retrieval, English",
        paper={
            "CLIP-L-336": (86.2, 84.0),
            "CLIP-L-336 + LLM2CLIP (15 M)": (98.1, 98.4),
            "EVA02-L-336": (91.5, 89.4),
            "EVA02-L-336 + LLM2CLIP (15 M)": (98.8, 99.2),
            "EVA02-L-224, LLM without CC": (55.1, 46.1),
        },
    ),
    Suite(
        name="urban-1k",
        title="Urban-1k",
        requires={"image": URBAN, "caption": URBAN},
        read=read_urban,
        images=1000,
        order=4,
        table="Retrieval, English",
        paper={
            "CLIP-L-336": (72.8, 57.0),
            "CLIP-L-336 + LLM2CLIP (15 M)": (90.3, 93.2),
            "EVA02-L-336": (76.6, 70.0),
            "EVA02-L-336 + LLM2CLIP (15 M)": (89.5, 94.2),
            "EVA02-L-224, LLM without CC": (37.2, 35.1),
        },
    ),
    Suite(
        name="docci",
        title="DOCCI (test)",
        requires={
            "docci_descriptions.jsonlines": f"{DOCCI}/docci_descriptions.jsonlines",
            "images": f"{DOCCI}/docci_images.tar.gz",
        },
        read=read_docci,
        images=5000,
        order=5,
        table="Retrieval, English",
        paper={
            "CLIP-L-336": (67.4, 65.7),
            "CLIP-L-336 + LLM2CLIP (15 M)": (87.7, 89.0),
            "EVA02-L-336": (74.7, 76.4),
            "EVA02-L-336 + LLM2CLIP (15 M)": (89.2, 91.3),
            "EVA02-L-224, LLM without CC": (39.3, 32.3),
        },
    ),
]
