"""How each suite's own files are read: a folder in the usual layout becomes rows of images and captions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm2clip_plugin.data.sources.records import Caption
from llm2clip_plugin.evaluate.listing import Row

CAPTIONS = 5  # of an image, in the Karpathy splits: the field leaves out the few sixth and seventh ones
SHAREGPT4V = "share-captioner_coco_lcs_sam_1246k_1107.json"
SHAREGPT4V_ITEMS = 1000  # its first items are the benchmark (Long-CLIP holds them out of training)
FLICKR_CN = ("flickr30k_cn_test.txt", "flickr30k_cna_test.txt")
FLICKR_CN_LINE = re.compile(r"(\d+)(?:\.jpg)?(?:#\S*)?[\s,]+(.*)")
SUGARCREPE = {  # group -> file; the group of objects was called "ent" in early copies
    "replace_obj": ("replace_obj.json", "replace_ent.json"),
    "replace_att": ("replace_att.json",),
    "replace_rel": ("replace_rel.json",),
    "swap_obj": ("swap_obj.json", "swap_ent.json"),
    "swap_att": ("swap_att.json",),
    "add_obj": ("add_obj.json", "add_ent.json"),
    "add_att": ("add_att.json",),
}


def flickr30k(folder: Path) -> list[Row]:
    """``dataset_flickr30k.json`` and ``flickr30k-images/``."""
    return _karpathy(folder / "dataset_flickr30k.json", lambda item: folder / "flickr30k-images" / item["filename"])


def coco(folder: Path) -> list[Row]:
    """``dataset_coco.json`` and ``val2014/``."""
    return _karpathy(folder / "dataset_coco.json", lambda item: folder / item["filepath"] / item["filename"])


def _karpathy(path: Path, image: Callable[[dict[str, Any]], Path]) -> list[Row]:
    """The test split of Karpathy's JSON, the first five captions of each image."""
    body = read_json(path)
    with naming(path):
        return [
            Row(item["filename"], image(item), _captions(part["raw"] for part in item["sentences"][:CAPTIONS]))
            for item in body["images"]
            if item["split"] == "test"
        ]


def sharegpt4v(folder: Path) -> list[Row]:
    """The first thousand items of the share-captioner JSON, images below ``data/`` or beside it."""
    path = folder / SHAREGPT4V
    base = folder / "data" if (folder / "data").is_dir() else folder
    with naming(path):
        return [
            Row(item["image"], base / item["image"], _captions([item["conversations"][1]["value"]], "long"))
            for item in first_items(path, SHAREGPT4V_ITEMS)
        ]


def first_items(path: Path, count: int, block: int = 1 << 20) -> list[Any]:
    """The first ``count`` items of a JSON array, without reading the rest of a file of gigabytes."""
    decoder, items, text, mark = json.JSONDecoder(), [], "", "["
    with path.open(encoding="utf-8") as file:
        while len(items) < count and (more := file.read(block)):
            text += more
            if not items and text.lstrip()[:1] not in ("", "["):
                break
            while len(items) < count and (rest := text.lstrip().removeprefix(mark).lstrip()) and rest[0] != "]":
                try:
                    item, end = decoder.raw_decode(rest)
                except ValueError:
                    break  # cut within an item: read on
                items.append(item)
                text, mark = rest[end:], ","
    if not items or not isinstance(items[0], dict):
        raise ValueError(f"{path} is not a JSON array of objects")
    return items


def urban(folder: Path) -> list[Row]:
    """``image/N.jpg`` with ``caption/N.txt``."""
    texts = sorted((folder / "caption").glob("*.txt"), key=lambda file: (len(file.stem), file.stem))
    return [
        Row(file.stem, folder / "image" / f"{file.stem}.jpg", _captions([file.read_text("utf-8")], "long"))
        for file in texts
    ]


def docci(folder: Path) -> list[Row]:
    """The test split of ``docci_descriptions.jsonlines`` with ``images/``."""
    path = folder / "docci_descriptions.jsonlines"
    with naming(path):
        return [
            Row(item["example_id"], folder / "images" / item["image_file"], _captions([item["description"]], "long"))
            for item in json_lines(path)
            if item["split"] == "test"
        ]


def xm3600(folder: Path) -> list[Row]:
    """``captions.jsonl`` (a field a language) with ``images/KEY.jpg``; every caption of every language."""
    path, rows = folder / "captions.jsonl", []
    with naming(path):
        for item in json_lines(path):
            captions = [
                Caption(text, "short", language)
                for language, value in item.items()
                if isinstance(value, dict) and "caption" in value
                for text in value["caption"]
            ]
            key = item["image/key"]
            rows.append(Row(key, folder / "images" / f"{key}.jpg", tuple(captions)))
    return rows


def flickr30k_cn(folder: Path) -> list[Row]:
    """Lines ``IMAGE.jpg,CAPTION``, ``IMAGE.jpg#0#zhc<TAB>CAPTION``, or ``IMAGE CAPTION`` (Flickr30k-CNA)."""
    path = next(folder / name for name in FLICKR_CN if (folder / name).is_file())
    images = _first_folder(folder / "flickr30k-images", folder.parent / "flickr30k" / "flickr30k-images")
    captions: dict[str, list[str]] = {}
    for line in path.read_text("utf-8-sig").splitlines():
        if (found := FLICKR_CN_LINE.match(line)) and found[2].strip():  # else a heading
            captions.setdefault(found[1], []).append(found[2].strip())
    if not captions:
        raise ValueError(f"{path} is not laid out as expected: no line begins with the number of an image")
    return [Row(stem, images / f"{stem}.jpg", _captions(texts, language="zh")) for stem, texts in captions.items()]


def coco_cn(folder: Path) -> list[Row]:
    """``coco-cn_test.txt`` (image names) and ``imageid.human-written-caption.txt`` (``NAME#N<TAB>CAPTION``)."""
    wanted = (folder / "coco-cn_test.txt").read_text("utf-8").split()
    captions: dict[str, list[str]] = {}
    for line in (folder / "imageid.human-written-caption.txt").read_text("utf-8").splitlines():
        name, tab, text = line.partition("\t")
        if tab and text.strip():
            captions.setdefault(name.split("#")[0], []).append(text.strip())
    rows = []
    for name in wanted:
        split = "val2014" if "val2014" in name else "train2014"
        images = _first_folder(folder / split, folder.parent / "coco" / split)
        rows.append(Row(name, images / f"{name}.jpg", _captions(captions.get(name, []), language="zh")))
    return rows


def sugarcrepe(folder: Path) -> list[Row]:
    """The seven JSON files with COCO's ``val2017/``; an image once, a caption's kind says ``GROUP/ID/right|wrong``."""
    images = _first_folder(folder / "val2017", folder.parent / "coco" / "val2017")
    captions: dict[str, list[Caption]] = {}
    for group, names in SUGARCREPE.items():
        path = next(folder / name for name in names if (folder / name).is_file())
        body = read_json(path)
        with naming(path):
            for identity, item in body.items() if isinstance(body, dict) else enumerate(body):
                of_image = captions.setdefault(item["filename"], [])
                of_image.append(Caption(item["caption"], f"{group}/{identity}/right"))
                of_image.append(Caption(item["negative_caption"], f"{group}/{identity}/wrong"))
    return [Row(name, images / name, tuple(of_image)) for name, of_image in captions.items()]


def _captions(texts: Iterable[str], kind: str = "short", language: str = "en") -> tuple[Caption, ...]:
    """Texts on one line each, blank ones left out."""
    return tuple(Caption(" ".join(text.split()), kind, language) for text in texts if text.strip())


def _first_folder(*folders: Path) -> Path:
    """The first folder that is there, else the first."""
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def read_json(path: Path) -> Any:
    """A JSON file; ValueError names it."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def json_lines(path: Path) -> Iterator[Any]:
    """The objects of a JSON Lines file; ValueError names file and line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: not JSON: {error}") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn a missing field within the block into a ValueError that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not laid out as expected: {error!r}") from error
