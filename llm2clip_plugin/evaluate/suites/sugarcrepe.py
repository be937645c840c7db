"""SugarCrepe: each caption against a hard negative that differs from it in an object, an attribute
or a relation."""

from pathlib import Path

from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.evaluate.suites import (
    Row,
    Suite,
    first_existing,
    hard_negatives,
    read_json,
)

HOME = "https://github.com/RAIVNLab/sugar-crepe (folder data)"
COCO_VAL2017 = "http://images.cocodataset.org/zips/val2017.zip"
GROUPS = (
    "replace_obj",
    "replace_att",
    "replace_rel",
    "swap_obj",
    "swap_att",
    "add_obj",
    "add_att",
)


def read(folder: Path) -> list[Row]:
    """The seven JSON files with COCO's ``val2017/``: each image once, its captions of kind
    ``GROUP/ID/right|wrong``."""
    images = first_existing(folder / "val2017", folder.parent / "coco" / "val2017")
    captions: dict[str, list[Caption]] = {}
    for group in GROUPS:
        for number, item in read_json(folder / f"{group}.json").items():
            of_image = captions.setdefault(item["filename"], [])
            of_image.append(Caption(item["caption"], f"{group}/{number}/right"))
            of_image.append(
                Caption(item["negative_caption"], f"{group}/{number}/wrong")
            )
    return [
        Row(name, images / name, tuple(of_image)) for name, of_image in captions.items()
    ]


FILES = {f"{group}.json": HOME for group in GROUPS}
IMAGES = {"val2017|../coco/val2017": COCO_VAL2017}
SUITE = Suite(
    name="sugarcrepe",
    requires=FILES | IMAGES,
    read=read,
    measure=hard_negatives,
    choose=False,
)
