"""docs/first-day.md as printed, in little: its blocks up to LLaVA, on drawn pictures and models of two layers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from own_photos import make_models, make_photos
from page import ROOT, CommandServer, blocks, llm2clip_words, run_block
from tower_runs import environment

PAGE = ROOT / "docs" / "first-day.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """Runs a line of the page in the folder where the user works."""
    folder = tmp_path_factory.mktemp("first-day")
    make_photos(folder)
    make_models(folder)
    home = {"LLM2CLIP_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "LLM2CLIP_CACHE": str(folder / "cache")}
    variables = environment(**home)
    server = CommandServer(folder, variables)

    def run(command: str) -> tuple[int, str]:
        if (words := llm2clip_words(command)) is not None:
            return server.run(words)
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=variables, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    yield run
    server.close()


def test_the_page_runs_as_printed(run):
    steps = [block for block in blocks(PAGE) if not block.heading.startswith("In LLaVA")]
    assert len(steps) >= 9
    for block in steps:
        run_block(block, run)


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
