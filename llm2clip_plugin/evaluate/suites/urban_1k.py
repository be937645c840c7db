"""Urban-1k: 1,000 street scenes, one long caption each."""

from pathlib import Path

from llm2clip_plugin.evaluate.suites import Row, Suite, to_captions

HUB = "https://huggingface.co/datasets/BeichenZhang/Urban1k"


def read(folder: Path) -> list[Row]:
    """``image/N.jpg`` with ``caption/N.txt``, in the order of N."""
    texts = sorted((folder / "caption").glob("*.txt"), key=lambda file: (len(file.stem), file.stem))
    return [
        Row(file.stem, folder / "image" / f"{file.stem}.jpg", to_captions([file.read_text("utf-8")], "long"))
        for file in texts
    ]


SUITE = Suite(
    name="urban-1k",
    title="Urban-1k",
    requires={"image": HUB, "caption": HUB},
    read=read,
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
)
