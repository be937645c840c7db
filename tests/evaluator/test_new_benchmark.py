"""A benchmark is one file: from another folder it is planned, scored, compared and shown like the
others."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava_integration.evaluator.benchmarks import bench, rules
from llava_integration.evaluator.benchmarks.bench import plans
from llava_integration.evaluator.compare import command as compare
from llm2clip_plugin.contracts import ScoreFile

SHAPES = ("circle", "square", "star", "cross") * 5


@pytest.fixture
def data(tmp_path, monkeypatch):
    """LLaVA's evaluation folder with the benchmark's files; its rule is in a folder of this
    test."""
    monkeypatch.setattr(
        rules,
        "__path__",
        [*rules.__path__, str(Path(__file__).parent / "new_benchmark")],
    )
    folder = tmp_path / "eval" / "shapes"
    (folder / "images").mkdir(parents=True)
    rows = [
        {
            "question_id": n,
            "image": f"{n // 2}.png",
            "text": f"Which shape has number {n}?",
            "shape": shape,
        }
        for n, shape in enumerate(SHAPES)
    ]
    (folder / "shapes.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    for n in range(len(SHAPES) // 2):
        Image.new("RGB", (40, 30), (20 * n, 0, 90)).save(folder / "images" / f"{n}.png")
    yield tmp_path / "eval"
    sys.modules.pop("llava_integration.evaluator.benchmarks.rules.shapes", None)


def answer_file(path, right):
    """LLaVA's answers, of which the first ``right`` are right."""
    rows = [
        {
            "question_id": n,
            "prompt": f"Which shape has number {n}?",
            "text": f" {shape.title()}." if n < right else "?",
        }
        for n, shape in enumerate(SHAPES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_planned_by_bench_mllm(data, tmp_path, capsys):
    start = [
        "--model-path",
        "org/llava",
        "--data",
        str(data),
        "--output",
        str(tmp_path / "out"),
    ]
    assert bench.main([*start, "--plan"]) == 0
    output = capsys.readouterr().out
    assert "shapes" in output
    assert "will run" in output
    assert "no folder pope" in output
    (task,) = plans(["shapes"], data, tmp_path)
    assert not task.missing
    assert task.image_folder == data / "shapes" / "images"
    assert not task.unscored
    words = bench.evaluate_command(
        task, bench.COMMAND.parse(start), tmp_path / "answers.jsonl"
    )
    assert words[words.index("--max-new-tokens") + 1] == "8"
    assert words[words.index("--question-file") + 1] == str(
        data / "shapes" / "shapes.jsonl"
    )


def test_scored_compared_and_shown(data, tmp_path, capsys):
    for model, right in (("base", 8), ("new", 17)):
        path = answer_file(tmp_path / f"{model}.jsonl", right)
        bench.main_score(
            [
                "shapes",
                "--data",
                str(data / "shapes"),
                "--answers",
                str(path),
                "--model",
                model,
                "--json",
                str(tmp_path / model / "shapes.scores.json"),
            ]
        )
    assert "Shapes of new: 85.00 %" in capsys.readouterr().out
    record = ScoreFile.read(tmp_path / "new" / "shapes.scores.json")
    assert record.metrics == {"accuracy_percent": 85.0}
    assert record.counts["missing"] == 0
    compare.main(
        [
            str(tmp_path / "base"),
            str(tmp_path / "new"),
            "--output",
            str(tmp_path / "report"),
        ]
    )
    comparison = json.loads((tmp_path / "report" / "compare.json").read_text())
    (row,) = comparison["rows"]
    assert (row["title"], row["base_score"], row["new_score"], row["images"]) == (
        "Shapes",
        40.0,
        85.0,
        10,
    )
    assert comparison["references"] == {"LLaVA-1.5 7B (official)": {"shapes": 61.5}}
    page = (tmp_path / "report" / "compare.html").read_text()
    page_data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(page_data["questions"]) == 9
    assert all(question["image"] for question in page_data["questions"])
    assert "61.5" in page
