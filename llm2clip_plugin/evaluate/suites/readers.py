"""What several suites' readers share."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm2clip_plugin.data.sources.records import Caption
from llm2clip_plugin.evaluate.in_memory_source import Row
from llm2clip_plugin.outside.values import read_json_value as read_json

KARPATHY = "caption_datasets.zip of https://cs.stanford.edu/people/karpathy/deepimagesent/"
KARPATHY_CAPTIONS = 5  # of an image; the field drops the few sixth and seventh ones
FLICKR30K_IMAGES = "https://shannon.cs.illinois.edu/DenotationGraph/ (on request)"
COCO_VAL2014 = "http://images.cocodataset.org/zips/val2014.zip"


def karpathy_test(path: Path, image: Callable[[dict[str, Any]], Path]) -> list[Row]:
    """The test split of Karpathy's JSON; ``image`` maps an item to its image file."""
    body = read_json(path)
    with expected_layout(path):
        return [
            Row(
                item["filename"],
                image(item),
                to_captions(part["raw"] for part in item["sentences"][:KARPATHY_CAPTIONS]),
            )
            for item in body["images"]
            if item["split"] == "test"
        ]


def to_captions(texts: Iterable[str], kind: str = "short", language: str = "en") -> tuple[Caption, ...]:
    """Captions with line breaks and repeated spaces collapsed; blank texts are dropped."""
    return tuple(Caption(" ".join(text.split()), kind, language) for text in texts if text.strip())


def first_existing(*folders: Path) -> Path:
    """The first of the folders that exists; the first one if none does."""
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def read_json_lines(path: Path) -> Iterator[Any]:
    """The objects of a JSON Lines file; ValueError names the file and the line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from error


@contextmanager
def expected_layout(path: Path) -> Iterator[None]:
    """Turn a missing field within the block into a ValueError that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"unexpected layout of {path}: {error!r}") from error
