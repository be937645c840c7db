"""A tower directory that is not what was written is refused in Python too: every file, each field of the card."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.directory import TowerChecksums, check_card, read_json, write_json
from llm2clip_plugin.vision.dual import DualEncoder, load_dual
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.families import read_config
from llm2clip_plugin.vision.family import DualConfig
from llm2clip_plugin.vision.towers import load_tower

from .conftest import TRANSFORMERS_TOWERS

FAMILIES = ["clip", "siglip", "dinov2", "eva02"]
EVA02 = "../A_vision_towers/eva02_l14/weights.safetensors"
FILES = ["model.safetensors", "text_adapter.safetensors", "llm2clip.json", "config.json", "preprocessor_config.json"]


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


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def change(path: Path, **fields: object) -> None:
    write_json(path, read_json(path) | fields)


@pytest.mark.parametrize("position", [-1, -1000])
@pytest.mark.parametrize("file", FILES[:2])
def test_a_flipped_byte_of_the_weights(tower: Path, file: str, position: int) -> None:
    expected = json.loads((tower / "llm2clip.json").read_text())
    recorded = expected["weights_sha256" if file == FILES[0] else "adapter_sha256"]
    load_dual(tower)
    flip(tower / file, position)
    for read in (load_dual, check_card):
        with pytest.raises(ContractError, match=rf"{file} has SHA-256 \w+, but .*{recorded}.*export the tower again"):
            read(tower)


@pytest.mark.parametrize("file", [*FILES[2:], "checksums.json"])
def test_any_flipped_byte_of_the_texts(tower: Path, file: str) -> None:
    """One in seven bytes of each file: an error of one line that names a file, never other features in silence."""
    whole = (tower / file).read_bytes()
    for position in range(0, len(whole), 7):
        flip(tower / file, position)
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{file}|checksums\.json|llm2clip\.json"):
            read_config(tower)
        (tower / file).write_bytes(whole)
    assert read_config(tower)[0].name == "clip"


def test_a_flipped_header_is_told_as_damage(tower: Path) -> None:
    """The error of whoever parses the file comes second."""
    weights = tower / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"post_layernorm", b"past_layernorm"))
    with pytest.raises(ContractError, match=r"model\.safetensors has SHA-256"):
        load_tower(tower)


@pytest.mark.parametrize(
    ("field", "value"), [("weights_sha256", "0" * 64), ("adapter_sha256", "0" * 64), ("adapter_sha256", "")]
)
def test_a_card_with_another_hash(tower: Path, field: str, value: str) -> None:
    (tower / "checksums.json").unlink()
    change(tower / "llm2clip.json", **{field: value})
    with pytest.raises(ContractError, match=rf"has SHA-256 \w{{64}}, but llm2clip.json records '{value}'"):
        load_dual(tower)


@pytest.fixture(scope="module", params=["clip_vision", "siglip_vision", "dinov2", EVA02], ids=FAMILIES)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden tower of each family, without checksums.json."""
    folder, path = tmp_path_factory.mktemp("imported") / "tower", TRANSFORMERS_TOWERS / request.param
    import_tower(path, folder, config=path.with_name("config.json") if request.param == EVA02 else None)
    (folder / "checksums.json").unlink()
    return folder


@pytest.mark.parametrize("field", ["num_layers", "patch_size", "hidden_size", "image_size", "has_cls", "family"])
def test_a_card_of_another_architecture(imported: Path, tmp_path: Path, field: str) -> None:
    """In every family, before the weights are read."""
    folder = Path(shutil.copytree(imported, tmp_path / "tower", ignore=shutil.ignore_patterns("model.safetensors")))
    card = TowerCard.read(folder / TowerCard.FILE)
    others = {"has_cls": not card.has_cls, "family": "clip" if card.family == "dinov2" else "dinov2"}
    value = others[field] if field in others else getattr(card, field) + 1
    change(folder / "llm2clip.json", **{field: value})
    with pytest.raises(ContractError, match=rf"does not describe the tower.*{field} is {value!r}, not .*; the direct"):
        load_tower(folder)


def test_a_configuration_without_its_card_field_in_checksums(tower: Path) -> None:
    """The number of heads is in no card: the checksum of config.json covers it. It may be deleted for a change."""
    change(tower / "config.json", num_attention_heads=2)
    with pytest.raises(ContractError, match=r"config\.json has SHA-256 .*delete .*checksums\.json"):
        load_tower(tower)
    (tower / TowerChecksums.FILE).unlink()
    load_tower(tower)


def test_a_card_that_contradicts_itself(tower: Path) -> None:
    (tower / "checksums.json").unlink()
    change(tower / "llm2clip.json", projection_dim=9)
    with pytest.raises(ContractError, match="contradicts itself: projection_dim is 9, in dual 8"):
        load_dual(tower)


def test_fields_of_another_type(tower: Path) -> None:
    (tower / "checksums.json").unlink()
    change(tower / "llm2clip.json", num_layers="3")
    with pytest.raises(ContractError, match=r"llm2clip\.json: num_layers is '3', expected int"):
        load_tower(tower)


def test_a_configuration_that_is_none(tower: Path) -> None:
    (tower / "checksums.json").unlink()
    change(tower / "config.json", torch_dtype="fmoat32", dtype="fmoat32", num_hidden_layers="many")
    with pytest.raises(ContractError, match=r"config\.json"):
        load_tower(tower)


def test_a_missing_adapter(tower: Path) -> None:
    (tower / "text_adapter.safetensors").unlink()
    load_tower(tower)
    with pytest.raises(FileNotFoundError, match=r"no text_adapter\.safetensors in "):
        load_dual(tower)
