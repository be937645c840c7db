"""scripts/quickstart.sh refuses bad options in one line, before it makes an environment."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "quickstart.sh"


@pytest.mark.parametrize(
    "words, line",
    [
        (["--llava-llm", "gpt-5"], "error: unknown --llava-llm gpt-5; known: tiny, smollm2"),
        (["--llava-llm"], "error: --llava-llm needs a value"),
        (["--preset", "longer"], "error: unknown preset longer; known: default, long, smoke"),
        (["--teacher", "tuned"], "error: unknown teacher tuned; known: both, raw"),
        (["--seeds", "two"], "error: --seeds two is not a number above 0"),
    ],
)
def test_bad_options_are_one_line(tmp_path, words, line):
    done = subprocess.run(["bash", SCRIPT, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{line}\n")
