"""SugarCrepe: each caption against a hard negative that differs from it in an object, an attribute or a relation."""

from pathlib import Path

from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.evaluate.suites import Row, Suite, expected_layout, first_existing, hard_negatives, read_json

HOME = "https://github.com/RAIVNLab/sugar-crepe (folder data)"
COCO_VAL2017 = "http://images.cocodataset.org/zips/val2017.zip"
FILES = {  # group -> file; early copies call the group of objects "ent"
    "replace_obj": ("replace_obj.json", "replace_ent.json"),
    "replace_att": ("replace_att.json",),
    "replace_rel": ("replace_rel.json",),
    "swap_obj": ("swap_obj.json", "swap_ent.json"),
    "swap_att": ("swap_att.json",),
    "add_obj": ("add_obj.json", "add_ent.json"),
    "add_att": ("add_att.json",),
}


def read(folder: Path) -> list[Row]:
    """The seven JSON files with COCO's ``val2017/``: each image once, its captions of kind ``GROUP/ID/right|wrong``."""
    images = first_existing(folder / "val2017", folder.parent / "coco" / "val2017")
    captions: dict[str, list[Caption]] = {}
    for group, names in FILES.items():
        path = next(folder / name for name in names if (folder / name).is_file())
        body = read_json(path)
        with expected_layout(path):
            for number, item in body.items() if isinstance(body, dict) else enumerate(body):
                of_image = captions.setdefault(item["filename"], [])
                of_image.append(Caption(item["caption"], f"{group}/{number}/right"))
                of_image.append(Caption(item["negative_caption"], f"{group}/{number}/wrong"))
    return [Row(name, images / name, tuple(of_image)) for name, of_image in captions.items()]


SUITE = Suite(
    name="sugarcrepe",
    title="SugarCrepe",
    requires={"|".join(names): HOME for names in FILES.values()} | {"val2017|../coco/val2017": COCO_VAL2017},
    read=read,
    measure=hard_negatives,
    choose=False,
    order=9,
)
