"""docs/first-day.md as printed, in little: its blocks up to LLaVA, on drawn pictures and models of two layers; then
the cells of docs/first_day.ipynb in the same folder.

The blocks under "In LLaVA" run in LLaVA's environment: tests/llava/end_to_end/test_first_day.py.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from forked import run_command
from own_photos import make_models, make_photos
from printed_page import ROOT, blocks, llm2clip_words, run_block
from tower_runs import environment

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "first-day.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """Runs a line of the page in the folder where the user works."""
    folder = tmp_path_factory.mktemp("first-day")
    make_photos(folder)
    make_models(folder)
    home = {"LLM2CLIP_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "LLM2CLIP_CACHE": str(folder / "cache")}
    variables = environment(**home)

    def run(command: str) -> tuple[int | None, str]:
        if (words := llm2clip_words(command)) is not None:
            return run_command(words, variables, folder)
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=variables, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after the page's steps."""
    steps = [block for block in blocks(PAGE) if not block.heading.startswith("In LLaVA")]
    assert len(steps) >= 12
    for block in steps:
        run_block(block, run)
    return run.folder


def test_the_page_runs_as_printed(folder: Path):
    assert (folder / "towers" / "photos" / "model.safetensors").is_file()
    assert (folder / "report-retrieval" / "compare.html").is_file()


def test_the_notebook_runs_where_the_page_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(folder)
    cells = json.loads((ROOT / "docs" / "first_day.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in cells if cell["cell_type"] == "code"] == [[]] * len(code)
    names: dict[str, Any] = {}
    for number, source in enumerate(code):
        exec(compile(source, f"cell {number}", "exec"), names)
    told = capsys.readouterr().out
    assert "teacher: " in told and "R@1, image to text: " in told
    assert names["similarity"].shape == (16, 16) and names["search"]("small").size == (480, 160)
    # by hand as by the command: captions of one kind, no ties
    scores = json.loads((folder / "runs" / "photos" / "after.scores.json").read_text())
    assert (names["best"] == names["torch"].arange(16)).float().mean().item() == pytest.approx(
        scores["metrics"]["short:en/i2t_r1"], abs=0.07
    )


def test_the_page_is_read_as_it_is_meant(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "## One\n```bash\n# a comment\nfirst \\\n    --more\nsecond\n```\ntext\n```text\nloss 3.1 ...\n```\n"
        "```sh\nnever\n```\n## Two\n```bash\nthird\n```\n"
    )
    one, two = blocks(page)
    assert (one.heading, one.commands, one.printed) == ("One", ("first --more", "second"), "loss 3.1 ...\n")
    assert (two.heading, two.commands) == ("Two", ("third",))
    assert run_block(one, lambda command: (0, "loss 2.7 and more\n"))
    with pytest.raises(AssertionError, match="did not print"):
        run_block(one, lambda command: (0, "accuracy 2.7\n"))
    with pytest.raises(AssertionError, match="second"):
        run_block(one, lambda command: (int(command == "second"), "loss 1\n"))


def test_messages_of_the_page_are_those_of_the_code():
    section = PAGE.read_text(encoding="utf-8").partition("## What does this message mean?")[2]
    quoted = [
        line.split("`")[1] for line in section.splitlines() if line.startswith("| `") and "(by torch)" not in line
    ]
    assert len(quoted) >= 15
    code = "".join(
        path.read_text(encoding="utf-8")
        for package in ("llm2clip_plugin", "llava_integration")
        for path in (ROOT / package).rglob("*.py")
    )
    assert [message for message in quoted if message not in code] == []
