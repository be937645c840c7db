"""Flickr30k, the Karpathy test split: 1,000 images, five captions each."""

from pathlib import Path

from llm2clip_plugin.evaluate.suites import FLICKR30K_IMAGES, KARPATHY, Row, Suite, karpathy_test


def read(folder: Path) -> list[Row]:
    """``dataset_flickr30k.json`` and ``flickr30k-images/``."""
    return karpathy_test(folder / "dataset_flickr30k.json", lambda item: folder / "flickr30k-images" / item["filename"])


SUITE = Suite(
    name="flickr30k",
    title="Flickr30k (Karpathy test)",
    requires={"dataset_flickr30k.json": KARPATHY, "flickr30k-images": FLICKR30K_IMAGES},
    read=read,
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
)
