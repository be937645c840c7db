"""Caption retrieval accuracy over a data set: which captions are compared, and against a loop by hand."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from evaluate_world import write_llm

from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.evaluate.captions import find_pairs, measure_captions
from llm2clip_plugin.evaluate.config import CaptionSetConfig
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder

NAMES = ["cat", "dog", "boat", "tree", "house", "lake"]
GERMAN = ["Katze", "Hund", "Boot", "Baum", "Haus", "See"]


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = []
    for i, (name, german) in enumerate(zip(NAMES * 2, GERMAN * 2, strict=True)):  # each twice, as in two drawing styles
        texts = [
            {"text": name, "kind": "short"},
            {"text": f"a picture of a {name}", "kind": "long"},
            {"text": german, "kind": "short", "language": "de"},
        ]
        rows.append({"id": f"k{i}", "image": "x.png", "captions": texts})
    path = tmp_path_factory.mktemp("set") / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> CaptionEncoder:
    llm = write_llm(tmp_path_factory.mktemp("llm"))
    return CaptionEncoder(EncoderConfig(llm=str(llm), compute_dtype="float32", query_prompt="Query: "), "cpu")


def top1(encoder: CaptionEncoder, first: list[str], second: list[str], *, center: bool = False) -> float:
    """By a plain loop; the first as queries."""
    left = torch.cat([encoder.encode([text], query=True) for text in first])
    right = torch.cat([encoder.encode([text]) for text in second])
    if center:
        left, right = left - left.mean(0), right - right.mean(0)
    scores = F.normalize(left, dim=1) @ F.normalize(right, dim=1).T
    return sum(int(scores[i].argmax()) == i for i in range(len(first))) / len(first)


def test_accuracy_is_that_of_a_plain_loop(teacher: CaptionEncoder, captions: Path) -> None:
    rows = {row.name: row for row in measure_captions(teacher, CaptionSetConfig(captions=str(captions)))}
    assert list(rows) == ["short->long", "de->en", "languages"]
    long = [f"a picture of a {name}" for name in NAMES]
    assert rows["short->long"].pairs == 6  # the same pair of another style counts once
    assert rows["short->long"].cra == pytest.approx(top1(teacher, NAMES, long))
    assert rows["short->long"].centred == pytest.approx(top1(teacher, NAMES, long, center=True))
    assert rows["de->en"].cra == rows["languages"].cra == pytest.approx(top1(teacher, GERMAN, NAMES))


def test_pairs_are_of_two_different_texts() -> None:
    same, two = (Caption("x"), Caption("x", "long")), (Caption("y"), Caption("y", "long"), Caption("z", "long"))
    found = find_pairs([("a", same), ("b", two)], ("short", "en"), ("long", "en"))
    assert found == [("b", "y", "z")]
