"""Short runs of stage 1."""

import json
from pathlib import Path
from typing import Any

import pytest
from tower_runs import lines

from llm2clip_plugin.stages.llm import finetune_llm
from llm2clip_plugin.stages.llm_config import FINETUNE_LLM

WORDS = (
    "a red bicycle leans against the brick wall of an old house near two sleeping dogs in rain"
).split()


STEPS = 4


# fp32 sums in another order, through AdamW, over a few steps of a rate that changes the loss by
# tenths
SAME = 2e-5


def write_captions(path: Path, count: int = 48) -> Path:
    """Names of one to three words and long captions that hold them."""
    names = [f"{WORDS[i % 16]} {WORDS[i * 7 % 16]} {i % 12 % 8}" for i in range(count)]
    long = [" ".join([*WORDS[: i % 16], name]) for i, name in enumerate(names)]
    pairs = enumerate(zip(names, long, strict=True))
    rows = [
        {
            "id": f"k{i}",
            "image": "x.png",
            "caption": caption,
            "long_caption": long_caption,
        }
        for i, (caption, long_caption) in pairs
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captions(tmp_path_factory.mktemp("captions") / "caps.jsonl")


def options(captions: Path, llm: Path, output: Path, *more: str) -> list[str]:
    """A short run at a rate that moves the loss; dropout 0, so that micro-batches can be
    compared."""
    return [
        *(
            str(captions),
            "--llm",
            str(llm),
            "--compute-dtype",
            "float32",
            "--output-dir",
            str(output),
        ),
        *(
            "--global-batch",
            "16",
            "--max-steps",
            str(STEPS),
            "--lr",
            "3e-3",
            "--warmup-steps",
            "0",
        ),
        *(
            "--dropout",
            "0",
            "--scale",
            "20",
            "--query-prompt",
            "Instruct: find the picture. Query: ",
            *more,
        ),
    ]


def tuned(captions: Path, llm: Path, output: Path, *more: str) -> Path:
    """The adapter of such a run."""
    return finetune_llm(FINETUNE_LLM.parse(options(captions, llm, output, *more)))


def step_lines(output: Path) -> list[dict[str, Any]]:
    # without evaluations and checkpoints
    return [line for line in lines(output) if "loss" in line]


def losses(output: Path) -> list[float]:
    records = step_lines(output)
    assert [line["step"] for line in records] == list(range(1, len(records) + 1))
    return [line["loss"] for line in records]


@pytest.fixture(scope="module")
def plain(
    captions: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One rank, one batch, one length group: what all other ways must equal."""
    output = tmp_path_factory.mktemp("plain")
    assert tuned(captions, llama, output, "--length-groups", "1") == output / "adapter"
    return output
