"""DOCCI, the test split: 5,000 images, one long description each."""

from pathlib import Path

from llm2clip_plugin.evaluate.suites import Row, Suite, expected_layout, read_json_lines, to_captions

DOWNLOADS = "https://storage.googleapis.com/docci/data"


def read(folder: Path) -> list[Row]:
    """The test items of ``docci_descriptions.jsonlines``, with ``images/``."""
    path = folder / "docci_descriptions.jsonlines"
    with expected_layout(path):
        return [
            Row(item["example_id"], folder / "images" / item["image_file"], to_captions([item["description"]], "long"))
            for item in read_json_lines(path)
            if item["split"] == "test"
        ]


SUITE = Suite(
    name="docci",
    title="DOCCI (test)",
    requires={
        "docci_descriptions.jsonlines": f"{DOWNLOADS}/docci_descriptions.jsonlines",
        "images": f"{DOWNLOADS}/docci_images.tar.gz",
    },
    read=read,
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
)
