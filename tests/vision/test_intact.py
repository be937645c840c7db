"""A tower directory that is not what was written is refused in Python too: its weights, each field of the card."""

import shutil
from pathlib import Path

import pytest
import torch

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision.directory import check_card, read_json, write_json
from llm2clip_plugin.vision.dual import DualEncoder, load_dual
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.family import DualConfig
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


def change(path: Path, **fields: object) -> None:
    write_json(path, read_json(path) | fields)


@pytest.mark.parametrize("file", WEIGHTS)
def test_a_flipped_byte_of_the_weights(tower: Path, file: str) -> None:
    load_dual(tower)
    data = bytearray((tower / file).read_bytes())
    data[-1] ^= 1
    (tower / file).write_bytes(data)
    for read in (load_dual, check_card):
        with pytest.raises(ContractError, match=rf"{file} has SHA-256 \w{{64}}"):
            read(tower)


@pytest.mark.parametrize("field", ["num_layers", "patch_size", "hidden_size", "image_size", "has_cls", "family"])
def test_a_card_of_another_architecture(tower: Path, field: str) -> None:
    """Before the weights are read."""
    (tower / WEIGHTS[0]).unlink()
    card = TowerCard.read(tower / TowerCard.FILE)
    others = {"has_cls": False, "family": "dinov2"}
    value = others[field] if field in others else getattr(card, field) + 1
    change(tower / "llm2clip.json", **{field: value})
    with pytest.raises(ContractError, match=rf"{field} is {value!r}, not "):
        load_tower(tower)
