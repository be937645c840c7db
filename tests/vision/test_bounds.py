"""A tower directory with impossible sizes is refused with the file and the value, before a model is allocated."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision.checkpoint import check_crop, preprocessor_config
from llm2clip_plugin.vision.directory import ADAPTER_FILE, PREPROCESSOR_FILE, WEIGHTS_FILE
from llm2clip_plugin.vision.dual import DualEncoder, load_dual
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.families import read_config
from llm2clip_plugin.vision.family import DualConfig
from llm2clip_plugin.vision.towers import load_tower

from .conftest import TOWERS_ALONE, TRANSFORMERS_TOWERS


@pytest.fixture
def copy(tmp_path: Path):
    """A function that copies a golden tower, with changes to one of its JSON files."""

    def make(name: str = "clip_vision", file: str = "config.json", **changes: Any) -> Path:
        target = tmp_path / name
        target.mkdir()
        for path in (TRANSFORMERS_TOWERS / name).iterdir():
            if path.name != "states.safetensors":
                (target / path.name).write_bytes(path.read_bytes())
        body = json.loads((target / file).read_text()) if (target / file).is_file() else {}
        (target / file).write_text(json.dumps(body | changes))
        return target

    return make


@pytest.mark.parametrize("name", [*TOWERS_ALONE, "clip_full"])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 10**9}, "hidden_size is 1000000000, expected a whole number from 1 to 131072"),
        ({"hidden_size": 61440}, r"blocks of width 61440 do not fit into the \d+ bytes of model.safetensors"),
        ({"hidden_size": "32"}, "hidden_size is '32', expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number from 1"),
        ({"num_attention_heads": 7}, r"hidden_size \d+ is not divisible by num_attention_heads 7"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, expected"),
        ({"image_size": 10**9}, "image_size is 1000000000, expected"),
        ({"image_size": float("nan")}, "image_size is nan, expected"),
        ({"patch_size": 0}, "patch_size is 0, expected"),
        ({"patch_size": 4096}, "patch_size 4096 exceeds image_size"),
    ],
)
def test_sizes_in_a_configuration(copy, name: str, changes: dict[str, Any], message: str):
    if name == "clip_full":
        vision = json.loads((TRANSFORMERS_TOWERS / name / "config.json").read_text())["vision_config"]
        changes = {"vision_config": vision | changes}
    directory = copy(name, **changes)
    for open_it in (load_tower, read_config):
        with pytest.raises(ContractError, match=rf"{directory}.*{message}"):
            open_it(directory)


@pytest.mark.parametrize("name", TOWERS_ALONE)
def test_another_number_of_layers_than_the_weights_have(copy, name: str):
    layers = json.loads((TRANSFORMERS_TOWERS / name / "config.json").read_text())["num_hidden_layers"]
    for number in (layers - 1, layers + 1):
        directory = copy(name, num_hidden_layers=number)
        with pytest.raises(
            ContractError, match=f"num_hidden_layers is {number}, but the weights in .* have {layers} bl"
        ):
            load_tower(directory)
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


def test_a_header_bomb_names_its_file(copy):
    directory = copy()
    with open(directory / WEIGHTS_FILE, "r+b") as file:
        file.write(struct.pack("<Q", 1 << 60))
    with pytest.raises(ContractError, match=f"{directory / WEIGHTS_FILE} is not a complete safetensors file"):
        load_tower(directory)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_in_a_pickle_is_not_run(copy, tmp_path: Path):
    directory, mark = copy(), tmp_path / "ran"
    weights = load_file(directory / WEIGHTS_FILE)
    (directory / WEIGHTS_FILE).unlink()
    torch.save({**weights, "evil": Evil(mark)}, directory / "pytorch_model.bin")
    with pytest.raises(ContractError, match=r"pytorch_model.bin would run or construct posix.mkdir; nothing in it was"):
        load_tower(directory)
    assert not mark.exists()
    torch.save(weights, directory / "pytorch_model.bin")
    assert load_tower(directory).config.hidden_size == 32


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean is nan, expected a number from -10 to 10"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0.5, 0.5\], expected a list of 3 numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std is 0.0, expected a number from 0.001 to 10"),
        ({"image_std": "0.5"}, "image_std is '0.5', expected a list of 3 numbers"),
        ({"resample": 99}, "resample is 99, expected a whole number from 0 to 5"),
        (
            {"size": {"shortest_edge": 10**9}},
            "size.shortest_edge is 1000000000, expected a whole number from 1 to 16384",
        ),
        ({"crop_size": {"height": -1, "width": 30}}, "crop_size.height is -1, expected"),
        ({"rescale_factor": float("inf")}, "rescale_factor is inf, expected"),
        ({"do_resize": "yes"}, "do_resize is 'yes', expected true or false"),
    ],
)
def test_values_of_a_preprocessor(copy, changes: dict[str, Any], message: str):
    directory = copy(file=PREPROCESSOR_FILE, **changes)
    for read in (load_tower, preprocessor_config):
        with pytest.raises(ContractError, match=f"{directory / PREPROCESSOR_FILE}: {message}"):
            read(directory)


@pytest.fixture
def dual(tmp_path: Path) -> Path:
    """A dual encoder's directory."""
    torch.manual_seed(0)
    tower = load_tower(TRANSFORMERS_TOWERS / "clip_vision")
    export_tower(DualEncoder(tower, DualConfig(projection_dim=8, llm_width=12)), tmp_path / "dual", origin="x")
    return tmp_path / "dual"


def test_llavas_crop_is_the_towers_image(dual: Path):
    card = TowerCard.read(dual / TowerCard.FILE)
    check_crop(dual, card.image_size)
    body = json.loads((dual / PREPROCESSOR_FILE).read_text())
    (dual / PREPROCESSOR_FILE).write_text(json.dumps({**body, "size": {"shortest_edge": card.image_size + 1}}))
    with pytest.raises(
        ContractError, match=f"{PREPROCESSOR_FILE}: size is .*images have {card.image_size} pixels a side"
    ):
        check_crop(dual, card.image_size)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"projection_dim": 10**9}, "projection_dim is 1000000000, expected a whole number from 0 to 131072"),
        ({"dual": {"projection_dim": 10**9}}, "projection_dim is 8, in dual 1000000000"),
        (
            {"projection_dim": 10**5, "dual": {"projection_dim": 10**5}},
            f"{ADAPTER_FILE} does not match {TowerCard.FILE}",
        ),
        ({"dual": {"llm_width": 10**5}}, f"{ADAPTER_FILE} does not match"),
        ({"dual": {"adapter_blocks": "../../x"}}, "dual: adapter_blocks is '../../x', expected int"),
        ({"dual": {"adapter_expansion": 0}}, "adapter_expansion is 0, expected a whole number from 1 to 64"),
        ({"dual": {"logit_scale_init": float("nan")}}, "logit_scale_init is nan, expected a number"),
        ({"dual": {"adapter": 7}}, "dual: adapter is 7, expected str"),
        ({"dual": {"other": 7}}, "unknown fields in dual: .'other'."),
    ],
)
def test_widths_in_a_card_are_not_allocated(dual: Path, changes: dict[str, Any], message: str):
    path = dual / TowerCard.FILE
    body = json.loads(path.read_text())
    inner = {"dual": body["dual"] | changes["dual"]} if "dual" in changes else {}
    path.write_text(json.dumps(body | changes | inner))
    (dual / "checksums.json").unlink(missing_ok=True)  # an attacker would write them
    with pytest.raises(ValueError, match=message):
        load_dual(dual)


def test_an_adapter_of_another_shape_or_a_missing_one(dual: Path):
    state = load_file(dual / ADAPTER_FILE)
    save_file({name: value for name, value in state.items() if name != "logit_scale"}, dual / ADAPTER_FILE)
    with pytest.raises(ContractError, match=r"logit_scale|SHA-256"):
        load_dual(dual)
    (dual / ADAPTER_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=ADAPTER_FILE):
        load_dual(dual)
