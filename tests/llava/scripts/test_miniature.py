"""scripts/quickstart/miniature.sh, the whole way at a tiny size: nothing is learnt, everything is
made."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_chatml
from llava_world import TODAY, losses

from llm2clip_plugin.contracts import ScoreFile

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "quickstart" / "miniature.sh"


@pytest.mark.both_stacks
def test_a_language_model_that_speaks_chatml(world, tmp_path):
    """From a GGUF file, if it can be read, to open answers that are scored by keyword and by a
    teacher."""
    output = tmp_path / "miniature"
    packages = tmp_path / "packages"
    directory = tiny_chatml.make_directory(tmp_path / "tiny-chatml")
    llm = "smollm2" if TODAY and find_spec("gguf") else str(directory)
    if llm == "smollm2":
        tiny_chatml.make_package(packages)
    tiny_chatml.make_easy_vqa(packages)
    path = ":".join(map(str, (ROOT / "tests" / "support" / "on_cpu", packages, ROOT)))
    variables = {"LLAVA_PYTHON": str(world.programs / "python"), "PYTHONPATH": path}
    words = [
        "--before",
        world.towers["clip"],
        "--after",
        world.towers["other"],
        "--output",
        output,
        "--llm",
        llm,
    ]
    # transformers 4.37 has no bidirectional Llama
    words += ["--teacher", directory] if TODAY else []
    steps = ["--smoke", "--steps", "0", "2", "2"]
    printed = world.run("bash", SCRIPT, *words, *steps, **variables)
    assert "finetuned for minutes" in printed
    assert (output / "compare" / "compare.html").is_file()
    assert "mismatch" not in "".join(log.read_text() for log in output.glob("*.log"))
    questions = [
        json.loads(line)
        for line in (output / "data" / "questions.jsonl").read_text().splitlines()
    ]
    trained = json.loads((output / "data" / "finetune.json").read_text())
    assert not {row["image"] for row in trained} & {row["image"] for row in questions}
    config = json.loads((output / "llava-lora-after" / "config.json").read_text())
    assert (config["llm2clip_conversation"], config["vocab_size"]) == (
        "chatml_direct",
        len(tiny_chatml.TOKENS),
    )
    for side in ("before", "after"):
        learned = losses(output / f"llava-lora-{side}")
        assert learned, "no label was learned"
        assert all(math.isfinite(loss) and loss > 0 for loss in learned), (
            "no label was learned"
        )
        by_keyword = ScoreFile.read(
            output / "scores" / side / "emoji-name-keyword.scores.json"
        )
        assert {item["cluster"] for item in by_keyword.items}
        assert "pictures_exchanged" in by_keyword.metrics
        assert (
            output / "scores" / side / "emoji-name-teacher.scores.json"
        ).is_file() == TODAY
    refused = world.run("bash", SCRIPT, *words, "--smoke", fails=True, **variables)
    assert "was made with" in refused
    assert "choose another --output" in refused
