"""The Dockerfile installs what scripts/environments.sh does: its RUN steps run with stand-ins for apt-get, Python."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/bash
# Says what it is called with; makes an "environment" whose Python is itself.
echo "python $*" >>"$LOG"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""


def stages() -> dict[str, list[tuple[str, str]]]:
    """Target -> its instructions, those of the stage it starts from first."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            image, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            current = found[name] = [*found.get(image, [("FROM", image)])]
        elif word and not word.startswith("#"):
            current.append((word, rest))
    return found


@pytest.fixture
def build(tmp_path: Path):
    """Runs a target's RUN steps in a copy of the scripts; returns what was called."""
    image, programs, log = tmp_path / "image", tmp_path / "bin", tmp_path / "log"
    programs.mkdir()
    shutil.copytree(ROOT / "scripts", image / "scripts")
    shutil.copy(ROOT / "pyproject.toml", image)
    for name, body in {"python3": PYTHON, "apt-get": '#!/bin/bash\necho "apt-get $*" >>"$LOG"\n', "rm": ""}.items():
        if body:
            (programs / name).write_text(body)
            (programs / name).chmod(0o755)

    def run(target: str) -> list[str]:
        log.write_text("")
        for word, rest in stages()[target]:
            if word == "RUN":
                environment = {"PATH": f"{programs}:/usr/bin:/bin", "LOG": str(log)}
                step = rest.replace("rm -rf /var/lib/apt/lists/*", "true")
                done = subprocess.run(
                    ["/bin/bash", "-euo", "pipefail", "-c", step],
                    cwd=image,
                    env=environment,
                    capture_output=True,
                    text=True,
                )
                assert done.returncode == 0, done.stderr
        return log.read_text().replace(str(image), "ROOT").splitlines()

    return run


def test_the_training_image_is_the_training_environment(build):
    called = build("train")
    assert called[1].startswith("apt-get install") and "g++" in called[1]
    assert "python -m uv pip install -q --python .venv/bin/python -e ROOT[train]" in called
    assert list(stages())[-1] == "train"  # what `docker build .` makes


def test_the_llava_image_is_llavas_environment(build):
    called = "\n".join(build("llava"))
    assert "transformers==4.37.2" in called and "--no-deps llava-torch==1.2.2.post1" in called
    assert "python -m uv pip install -q --python .venv-llava/bin/python -e ROOT\n" in called + "\n"


def test_the_test_image_has_both_and_runs_what_ci_runs(build):
    called = "\n".join(build("test"))
    assert "-e ROOT[train,dev]" in called and "llava-torch==1.2.2.post1" in called
    assert ("CMD", '["scripts/test.sh"]') in stages()["test"]
    assert "exec scripts/test.sh" in (ROOT / ".ci" / "run").read_text()
