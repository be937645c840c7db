"""A model of ``vlm build`` before and after training, served by vLLM, scored and compared."""

import json
from pathlib import Path

from PIL import Image
from test_families import COLORS, QUESTION, trained
from test_vllm import vllm_serving

from llm2clip_plugin.cli import main as llm2clip


def test_scored_and_compared(tmp_path: Path) -> None:
    folder = trained(tmp_path / "after", "clip")
    rows = []
    for number in range(20):
        color = COLORS[number % 2]
        Image.new("RGB", (40 + number, 30), color).save(tmp_path / f"{number}.png")
        rows.append(
            {
                "image": f"{number}.png",
                "question": QUESTION.partition("\n")[0],
                "answer": color,
            }
        )
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for model in (folder.with_suffix(".built"), folder):
        with vllm_serving(model, VLLM_PLUGINS="") as url:
            words = [
                "--endpoint",
                url,
                "--output",
                str(tmp_path / f"scores-{model.name}"),
            ]
            assert llm2clip(["bench-mllm", str(tmp_path / "own.jsonl"), *words]) == 0
    sides = [
        str(tmp_path / f"scores-{name}" / "scores") for name in ("after.built", "after")
    ]
    assert llm2clip(["compare", *sides, "--output", str(tmp_path / "report")]) == 0
    before, after = (
        json.loads(next(Path(side).glob("*.json")).read_text()) for side in sides
    )
    assert (
        before["metrics"]["accuracy_percent"]
        < after["metrics"]["accuracy_percent"]
        == 100
    )
    report = json.loads((tmp_path / "report" / "compare.json").read_text())
    assert "better" in json.dumps(report)
