"""COCO, the Karpathy test split: 5,000 images, five captions each."""

from pathlib import Path

from llm2clip_plugin.evaluate.suites import COCO_VAL2014, KARPATHY, Row, Suite, karpathy_test


def read(folder: Path) -> list[Row]:
    """``dataset_coco.json`` and ``val2014/``."""
    return karpathy_test(folder / "dataset_coco.json", lambda item: folder / item["filepath"] / item["filename"])


SUITE = Suite(
    name="coco",
    title="COCO (Karpathy test, 5k)",
    requires={"dataset_coco.json": KARPATHY, "val2014": COCO_VAL2014},
    read=read,
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
)
