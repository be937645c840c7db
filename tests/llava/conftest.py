"""Fixtures of the tests against the unmodified llava-torch wheel, in LLaVA's environment.

Those marked ``both_stacks`` run in the training environment, too, where LLaVA runs on today's
libraries.
"""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

if find_spec("llava") is None:
    collect_ignore_glob = ["*test_*.py"]  # in folders below, too


def pytest_collection_modifyitems(config, items):
    """With today's libraries, leave out what is not marked ``both_stacks``."""
    if version("transformers").startswith("4."):
        return
    left_out = {
        item
        for item in items
        if HERE in item.path.parents and "both_stacks" not in item.keywords
    }
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def default_dtype():
    """float32 again: transformers 4.37 leaves the default at the dtype of a model whose loading
    failed."""
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The tiny world, made once."""
    from tiny_llava import make_world

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
    """A finetuned tiny LLaVA that has learned its pictures; what it answers depends on them.

    LLaVA draws the projector before it sets the seed, so its weights are given here. With these,
    asked for the color of each picture, the best token of every answer leads the next one by 2.4 or
    more in logits.
    """
    folder = world.root / "llava-answers"
    options = (
        "--max_steps",
        "80",
        "--learning_rate",
        "1e-2",
        "--pretrain_mm_mlp_adapter",
        world.projector(),
    )
    world.stage(
        "finetune", f"llm2clip:{world.towers['clip']}", folder, *map(str, options)
    )
    return folder
