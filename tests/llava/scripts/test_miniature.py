"""scripts/quickstart/miniature.sh, the whole way at a tiny size: nothing is learnt, everything is made."""

import json
import math
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_chatml
from llava_world import TODAY

from llm2clip_plugin.contracts import ScoreFile

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "quickstart" / "miniature.sh"


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
    told = world.run("bash", SCRIPT, *words, LLAVA_PYTHON=str(world.programs / "python"))
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
    again = world.run("bash", SCRIPT, *words, LLAVA_PYTHON=str(world.programs / "python"))
    assert "LLaVA stage" not in again and "is complete" in again


@pytest.mark.both_stacks
def test_a_language_model_that_speaks_chatml(world, tmp_path):
    """From a GGUF file, if it can be read, to open answers that are scored by keyword and by a teacher."""
    output, packages = tmp_path / "miniature", tmp_path / "packages"
    directory = tiny_chatml.make_directory(tmp_path / "tiny-chatml")
    llm = "smollm2" if TODAY and find_spec("gguf") else str(directory)
    if llm == "smollm2":
        tiny_chatml.make_package(packages)
    tiny_chatml.make_easy_vqa(packages)
    path = ":".join(map(str, (ROOT / "tests" / "llava" / "on_cpu", packages, ROOT)))
    variables = {"LLAVA_PYTHON": str(world.programs / "python"), "PYTHONPATH": path}
    words = ["--before", world.towers["clip"], "--after", world.towers["other"], "--output", output, "--llm", llm]
    words += ["--teacher", directory] if TODAY else []  # transformers 4.37 has no bidirectional Llama
    steps = ["--smoke", "--steps", "0", "2", "2"]
    told = world.run("bash", SCRIPT, *words, *steps, **variables)
    assert "finetuned for minutes" in told and (output / "compare" / "compare.html").is_file()
    assert "mismatch" not in "".join(log.read_text() for log in output.glob("*.log"))
    config = json.loads((output / "llava-lora-after" / "config.json").read_text())
    assert (config["llm2clip_conversation"], config["vocab_size"]) == ("chatml_direct", len(tiny_chatml.TOKENS))
    for side in ("before", "after"):
        learned = losses(output / f"llava-lora-{side}")
        assert learned and all(math.isfinite(loss) and loss > 0 for loss in learned), "no label was learned"
        by_keyword = ScoreFile.read(output / "scores" / side / "emoji-name-keyword.scores.json")
        assert {item["cluster"] for item in by_keyword.items} and "pictures_exchanged" in by_keyword.metrics
        assert (output / "scores" / side / "emoji-name-teacher.scores.json").is_file() == TODAY
    refused = world.run("bash", SCRIPT, *words, "--smoke", fails=True, **variables)
    assert "was made with" in refused and "choose another --output" in refused


@pytest.mark.both_stacks
@pytest.mark.parametrize(
    "words, line",
    [
        (["--steps", "1", "2"], "--steps needs 3 values"),
        (["--frobnicate"], "unknown option --frobnicate; see"),
        (["--held-out", "train"], "unknown --held-out train; known: test, validation"),
        (["--output", "made"], "--before is missing; see"),
    ],
)
def test_bad_options_are_one_line(tmp_path, words, line):
    done = subprocess.run(["bash", SCRIPT, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert line in done.stderr and list(tmp_path.iterdir()) == []
