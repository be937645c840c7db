"""scripts/quickstart/miniature.sh, the whole way at a tiny size: nothing is learnt, everything is made."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from llm2clip_plugin.contracts import ScoreFile

SCRIPT = Path(__file__).parents[3] / "scripts" / "quickstart" / "miniature.sh"


def losses(checkpoint: Path) -> list[float]:
    """Of a stage, in the order of its log."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


@pytest.mark.skipif(find_spec("easy_vqa") is None, reason="needs easy-vqa's pictures")
def test_the_miniature(world, tmp_path):
    """Two towers, two trainings each, answer the same questions; the report has pictures; a rerun does nothing."""
    output = tmp_path / "miniature"
    words = ["--before", world.towers["clip"], "--after", world.towers["other"], "--output", output]
    words += ["--smoke", "--steps", "2", "2", "2", "--seeds", "2"]
    told = world.run("bash", SCRIPT, *words, LLAVA_PYTHON=sys.executable)
    assert "tokenization mismatch" not in "".join(log.read_text() for log in output.glob("*.log"))
    questions = [json.loads(line) for line in (output / "data" / "questions.jsonl").read_text().splitlines()]
    trained = json.loads((output / "data" / "finetune.json").read_text())
    assert not {row["image"] for row in trained} & {row["image"] for row in questions}
    for side in ("before", "after"):
        for name in ("emoji-group", "easy-vqa"):
            record = ScoreFile.read(output / "scores" / side / f"{name}.scores.json")
            assert (output / "scores" / side / "seed1" / f"{name}.scores.json").is_file()
            assert record.items and all((output / "data" / "images" / item["image"]).is_file() for item in record.items)
            assert {"id", "cluster", "score", "question", "answer", "truth"} <= set(record.items[0])
            assert "miniature" in record.notes[0] and 0 < record.metrics["without_looking"] < 90
        config = json.loads((output / f"llava-{side}" / "config.json").read_text())
        tower = world.towers["clip" if side == "before" else "other"]
        assert config["llm2clip_tower"]["origin"] == str(tower.resolve())
    assert losses(output / "llava-after") != losses(output / "llava-after-seed1"), "both seeds trained alike"
    assert (output / "compare" / "compare.html").is_file() and "This is a miniature: a language model of" in told
    again = world.run("bash", SCRIPT, *words, LLAVA_PYTHON=sys.executable)
    assert "LLaVA stage" not in again and "is complete" in again
