"""Fixtures of the tests that run in LLaVA's environment, against the unmodified llava-torch wheel."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if find_spec("llava") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The tiny world, made once."""
    from llava_world import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty registry, and no tower chosen by the environment."""
    monkeypatch.setenv("LLM2CLIP_HOME", str(tmp_path / "home"))
    for name in ("LLM2CLIP_TOWER", "LLM2CLIP_S2_SCALES", "LLM2CLIP_UNFREEZE_TOWER"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="session")
def checkpoint(world):
    """A finetuned tiny LLaVA whose answers differ in length and word."""
    folder = world.root / "llava-answers"
    options = ("--max_steps", "40", "--learning_rate", "5e-3")
    world.stage("finetune", f"llm2clip:{world.towers['clip']}", folder, *options)
    return folder
