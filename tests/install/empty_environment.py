"""Empty environments, in which uv installs what pip would, and what is tried in them."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
# pip's index, constraints ...
AS_PIP = 'ROOT=$PWD; . scripts/environments.sh; export_uv_variables "$0"; exec "$0" -m uv "$@"'


def uv(*words: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run uv in a folder that has ``scripts/environments.sh``, with pip's settings."""
    command = ["bash", "-euc", AS_PIP, sys.executable, *map(str, words)]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def environment() -> dict[str, str]:
    """The variables of this process without those that would show a new environment our modules."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONSAFEPATH")
    return {name: value for name, value in os.environ.items() if name not in hidden}


class Environment:
    """A virtual environment without pip, empty at first."""

    def __init__(self, folder: Path, checkout: Path):
        self.folder = folder
        self.checkout = checkout
        self.python = folder / "bin" / "python"
        done = uv("venv", "--quiet", "--python", sys.executable, folder)
        assert done.returncode == 0, done.stderr

    def install(self, *words: str) -> str:
        """``pip install WORDS`` in the checkout; what uv says of it."""
        done = uv(
            "pip", "install", "--python", self.python, *words, folder=self.checkout
        )
        assert done.returncode == 0, f"{words}\n{done.stderr}"
        return done.stderr

    def run(self, *words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run one of its programs elsewhere than in the checkout."""
        command = [str(self.folder / "bin" / words[0]), *map(str, words[1:])]
        return subprocess.run(
            command,
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    def megabytes(self) -> float:
        """The size of its files."""
        return (
            sum(
                path.stat().st_size for path in self.folder.rglob("*") if path.is_file()
            )
            / 1e6
        )

    def has(self, module: str) -> bool:
        """Whether its Python finds a module."""
        code = f"import sys, importlib.util as u; sys.exit(u.find_spec({module!r}) is None)"
        return self.run("python", "-c", code, folder=self.folder).returncode == 0


def write_logs(folder: Path, scores: Sequence[Sequence[int]]) -> list[Path]:
    """One table of scores for each model, of the same questions."""
    sides = []
    for number, column in enumerate(scores):
        side = folder / f"model-{number}"
        side.mkdir()
        rows = [
            f"{item},{score},picture-{item // 2}" for item, score in enumerate(column)
        ]
        (side / "pope.csv").write_text("item,score,group\n" + "\n".join(rows) + "\n")
        sides.append(side)
    return sides


def compares(environment: Environment, folder: Path) -> None:
    """``llm2clip compare`` on two logs, in a folder that has nothing else, writes a page."""
    folder.mkdir()
    sides = write_logs(folder, [[1, 0, 0, 1, 0, 1] * 10, [1, 1, 0, 1, 0, 1] * 10])
    done = environment.run(
        "llm2clip", "compare", *sides, "--output", "report", folder=folder
    )
    assert done.returncode == 0, done.stderr
    assert "<html" in (folder / "report" / "compare.html").read_text(encoding="utf-8")


def checks_data(environment: Environment, folder: Path) -> None:
    """``llm2clip data make`` and ``check`` run."""
    (folder / "photos").mkdir(parents=True)
    Image.new("RGB", (32, 32), "green").save(folder / "photos" / "a.png")
    (folder / "photos" / "a.txt").write_text("a green square")
    for words in (
        ("data", "make", "photos", "--output", "tars"),
        ("data", "check", "tars"),
    ):
        done = environment.run("llm2clip", *words, folder=folder)
        assert done.returncode == 0, done.stderr
