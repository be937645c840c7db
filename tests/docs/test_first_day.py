"""docs/first-day.md as printed, in little: its blocks up to LLaVA, on drawn pictures and models of
two layers.

The blocks under "In LLaVA" run in LLaVA's environment:
tests/llava/end_to_end/test_first_day_llava.py.
"""

import json
import os
import subprocess

import pytest
from forked_python import programs
from own_photos import make_models, make_photos
from printed_page import ROOT, blocks, run_block
from tower_runs import environment

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "first-day.md"


LITTLE = " --tower-options='--heads.steps 50'"  # 300 are for real towers


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """Runs a line of the page in the folder where the user works, its programs forked."""
    folder = tmp_path_factory.mktemp("first-day")
    make_photos(folder)
    make_models(folder)
    home = {
        "LLM2CLIP_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "LLM2CLIP_CACHE": str(folder / "cache"),
    }
    variables = environment(PATH=f"{programs()}:{os.environ['PATH']}", **home)

    def run(command: str) -> tuple[int | None, str]:
        words = ["bash", "-c", command + LITTLE * command.startswith("llm2clip run")]
        done = subprocess.run(
            words,
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    run.folder = folder
    return run


def test_the_page_runs_as_printed_and_again(run):
    steps = [
        block for block in blocks(PAGE) if not block.heading.startswith("In LLaVA")
    ]
    assert len(steps) == 5
    for block in steps:
        run_block(block, run)
    out = run.folder / "runs" / "photos"
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("<details") == 24
    assert "data:image/jpeg" in page
    scores = json.loads((out / "after" / "validation.scores.json").read_text())[
        "metrics"
    ]
    assert f"{100 * scores['i2t_r1']:.1f}" in page
    # the scores of the run's own "before" are those of the tower that it is compared with
    before = json.loads((out / "before" / "validation.scores.json").read_text())[
        "metrics"
    ]
    recorded = json.loads((out / "after" / "run.json").read_text())["before"]
    assert recorded["i2t_r1"] == pytest.approx(before["i2t_r1"], abs=0.07)
    # the tower needs no path of here
    assert (out / "tower" / "teacher-adapter" / "adapter_model.safetensors").is_file()
    # again: nothing is left to do; with another option, from that stage on
    (command,) = next(block.commands for block in steps if block.heading == "Run")
    status, said = run(command)
    assert status == 0
    assert "0 of 11 stages to run" in said
    status, said = run(f"{command} --num-train-epochs 5 --dry-run")
    assert "stage 'stage 2' runs again: --num-train-epochs is 5, was 4" in said
    assert status == 0
    assert "4 of 11 stages to run" in said


def test_messages_of_the_page_are_those_of_the_code():
    section = PAGE.read_text(encoding="utf-8").partition(
        "## What does this message mean?"
    )[2]
    rows = [
        line
        for line in section.splitlines()
        if line.startswith("| `") and "` (by " not in line
    ]
    quoted = [row.split("`")[1] for row in rows]
    assert len(quoted) >= 15
    paths = [
        path
        for package in ("llm2clip_plugin", "llava_integration")
        for path in (ROOT / package).rglob("*.py")
    ]
    code = "".join(path.read_text(encoding="utf-8") for path in paths)
    assert [message for message in quoted if message not in code] == []
