"""scripts/house.py counts a small house right."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "house.py"
FILES = {
    "llm2clip_plugin/__init__.py": "",
    "llm2clip_plugin/cli.py": "def main():\n    from llm2clip_plugin.stages.tower import command\n",
    "llm2clip_plugin/stages/tower.py": "from llm2clip_plugin.train import loop\n",
    "llm2clip_plugin/train/loop.py": "import llm2clip_plugin.train.step\n",
    "llm2clip_plugin/train/step.py": (
        "from llm2clip_plugin.train import loop\nfrom llm2clip_plugin.stages import x\n"
    ),
    "llm2clip_plugin/stages/__init__.py": "x = 1\n",
    "llava_integration/plug/hook.py": "from llm2clip_plugin.data import rows\n",
    "llm2clip_plugin/data/rows.py": "import llava_integration.plug.hook\n",
    "docs/a.md": "three words here\n",
}
UP = (
    "llm2clip_plugin.data.rows -> llava_integration.plug.hook",
    "llm2clip_plugin.train.step -> llm2clip_plugin.stages",
    "llava_integration.plug.hook -> llm2clip_plugin.data.rows",
)


def test_arrows_cycles_and_words(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, check=True
    )
    counts = dict(
        line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]
    )
    assert [counts[name] for name in ("files", "lines", "words of docs")] == list("893")
    assert counts["files in import cycles"].startswith("4, ")
    assert counts["arrows up"].split(", ") == ["3", *UP]
    assert counts["files that train-tower imports"] == "4"
    assert counts["longest function"] == "2 (cli.main)"


PACKED = '''"""Two lines
of a docstring."""
import os


def split(text):
    found, rest = text[:2], text[2:]
    return [[letter for letter in word] for word in rest]
'''


def test_reading_counts_of_another_project(tmp_path: Path) -> None:
    folder = tmp_path / "other" / "src"
    folder.mkdir(parents=True)
    (folder / "packed.py").write_text(PACKED)
    done = subprocess.run(
        [sys.executable, SCRIPT, folder.parent],
        capture_output=True,
        text=True,
        check=True,
    )
    counts = dict(
        line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]
    )
    assert counts["lines of code"] == "4"
    assert counts["comprehensions in comprehensions, per 1,000 lines"] == "250.0"
    assert counts["`a, b = x, y`, per 1,000 lines"] == "250.0"
    # of found, rest, letter and word
    assert counts["filler names, of all assigned"] == "25.00%"


def test_a_folder_without_python_files_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"{tmp_path} has neither llm2clip_plugin nor src" in done.stderr
