"""The Dockerfile makes the environments of scripts/environments.sh, those that scripts/test.sh really installs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MADE = {  # target -> the environments that it makes, as scripts/environments.sh names them
    "train": ["train_environment .venv train"],
    "llava": ["llava_environment .venv-llava"],
    "test": ["train_environment .venv train,dev", "llava_environment .venv-llava"],
}


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


@pytest.mark.parametrize("target", MADE)
def test_a_target_makes_its_environments(target: str):
    packages, made = (rest for word, rest in stages()[target] if word == "RUN")
    assert "apt-get install" in packages and "g++" in packages
    assert made.split("; ") == ["ROOT=$PWD", ". scripts/environments.sh", *MADE[target]]


def test_the_test_image_runs_what_ci_runs_and_the_last_target_is_the_default():
    assert ("CMD", '["scripts/test.sh"]') in stages()["test"]
    assert "exec scripts/test.sh" in (ROOT / ".ci" / "run").read_text()
    assert list(stages())[-1] == "train"  # what `docker build .` makes
