"""A tower directory that is not what was written is refused in Python too: its weights."""

import shutil
from pathlib import Path

import pytest
import torch

from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision import DualConfig
from llm2clip_plugin.vision.directory import check_card
from llm2clip_plugin.vision.dual import DualEncoder, load_dual
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.towers import load_tower

from .conftest import TRANSFORMERS_TOWERS

WEIGHTS = ["model.safetensors", "text_adapter.safetensors"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = DualConfig(projection_dim=8, llm_width=12, adapter_blocks=1)
    dual = DualEncoder(load_tower(TRANSFORMERS_TOWERS / "clip_vision"), config).eval()
    folder = tmp_path_factory.mktemp("written") / "tower"
    export_tower(dual, folder, origin="x", metrics={"recall": 0.25})
    return folder


@pytest.fixture
def tower(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "tower"))


@pytest.mark.parametrize("file", WEIGHTS)
def test_a_flipped_byte_of_the_weights(tower: Path, file: str) -> None:
    load_dual(tower)
    data = bytearray((tower / file).read_bytes())
    data[-1] ^= 1
    (tower / file).write_bytes(data)
    for read in (load_dual, check_card):
        with pytest.raises(ContractError, match=rf"{file} has SHA-256 \w{{64}}"):
            read(tower)
