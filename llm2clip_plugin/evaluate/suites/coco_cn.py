"""COCO-CN, the test split: 1,000 images of COCO with captions written in Chinese."""

from pathlib import Path

from llm2clip_plugin.evaluate.suites import COCO_VAL2014, Row, Suite, first_existing, to_captions

NAMES, CAPTIONS = "coco-cn_test.txt", "imageid.human-written-caption.txt"
HOME = "https://github.com/li-xirong/coco-cn (on request)"


def read(folder: Path) -> list[Row]:
    """``coco-cn_test.txt`` (image names) and ``imageid.human-written-caption.txt`` (``NAME#N<TAB>CAPTION``)."""
    captions: dict[str, list[str]] = {}
    for line in (folder / CAPTIONS).read_text("utf-8").splitlines():
        name, tab, text = line.partition("\t")
        if tab and text.strip():
            captions.setdefault(name.split("#")[0], []).append(text.strip())
    rows = []
    for name in (folder / NAMES).read_text("utf-8").split():
        split = "val2014" if "val2014" in name else "train2014"
        images = first_existing(folder / split, folder.parent / "coco" / split)
        rows.append(Row(name, images / f"{name}.jpg", to_captions(captions.get(name, []), language="zh")))
    return rows


SUITE = Suite(
    name="coco-cn",
    title="COCO-CN (test)",
    requires={
        NAMES: HOME,
        CAPTIONS: HOME,
        "val2014|../coco/val2014": COCO_VAL2014,
        "train2014|../coco/train2014": "http://images.cocodataset.org/zips/train2014.zip",
    },
    read=read,
    images=1000,
    order=7,
    table="Retrieval, cross-lingual (trained on English only)",
    paper={"EVA02-L-224": (2.6, 1.0), "EVA02-L-224 + LLM2CLIP": (72.0, 70.1)},
    paper_source="site",
)
