"""XM3600 (Crossmodal-3600): 3,600 images with captions in 36 languages."""

from pathlib import Path

from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.evaluate.suites import Row, Suite, expected_layout, read_json_lines, recall_by_language


def read(folder: Path) -> list[Row]:
    """``captions.jsonl`` (one field per language) with ``images/KEY.jpg``; every caption of every language."""
    path, rows = folder / "captions.jsonl", []
    with expected_layout(path):
        for item in read_json_lines(path):
            captions = [
                Caption(text, "short", language)
                for language, value in item.items()
                if isinstance(value, dict) and "caption" in value
                for text in value["caption"]
            ]
            key = item["image/key"]
            rows.append(Row(key, folder / "images" / f"{key}.jpg", tuple(captions)))
    return rows


SUITE = Suite(
    name="xm3600",
    title="XM3600 (36 languages)",
    requires={
        "captions.jsonl": "https://google.github.io/crossmodal-3600/web-data/captions.zip",
        "images": "https://open-images-dataset.s3.amazonaws.com/crossmodal-3600/images.tgz",
    },
    read=read,
    measure=recall_by_language,
    images=3600,
    order=8,
    table="Retrieval, cross-lingual (trained on English only)",
    paper={"EVA02-L-224": (14.0, 8.0), "EVA02-L-224 + LLM2CLIP": (68.3, 56.0)},
    paper_source="site",
)
