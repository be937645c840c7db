"""A checkpoint and its tower part ways: copied, bundled, replaced, deleted, of another width."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava_world import model_arguments, untrained

from llava_integration.plug import towers
from llava_integration.plug.towers import TowerNotFoundError
from llm2clip_plugin.cli import main as llm2clip
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.errors import ContractError

pytestmark = pytest.mark.usefixtures("home")


def hash_of(tower):
    return TowerCard.read(tower / TowerCard.FILE).weights_sha256


def load(folder):
    """As load_pretrained_model does for a full checkpoint; returns the tower."""
    model = LlavaLlamaForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True)
    model.get_vision_tower().load_model()
    return model.get_vision_tower()


@pytest.fixture
def mine(world, tmp_path):
    """A tower directory that a test may move, and a checkpoint trained with it by its path."""
    tower = tmp_path / "towers" / "mine"
    shutil.copytree(world.towers["clip"], tower)
    return tower, untrained(world, f"llm2clip:{tower}", tmp_path / "llava-mine")


def test_moved_without_its_tower(mine, tmp_path):
    """The message says which tower, where it was looked for, and both ways out."""
    tower, checkpoint = mine
    moved = shutil.move(checkpoint, tmp_path / "elsewhere")
    shutil.rmtree(tower)
    with pytest.raises(TowerNotFoundError) as error:
        load(moved)
    message = str(error.value)
    assert (
        json.loads((moved / "config.json").read_text())["llm2clip_tower"][
            "weights_sha256"
        ]
        in message
    )
    for part in (
        str(tower),
        f"{moved}/vision_tower",
        "llm2clip use PATH",
        f"llm2clip llava bundle {moved}",
    ):
        assert part in message


def test_bundled_it_travels(mine, tmp_path, capsys):
    tower, checkpoint = mine
    assert llm2clip(["llava", "bundle", str(checkpoint)]) == 0
    assert hash_of(tower) in capsys.readouterr().out
    assert llm2clip(["llava", "bundle", str(checkpoint)]) == 0  # again: nothing to do
    moved = shutil.move(checkpoint, tmp_path / "elsewhere")
    features = load(moved)(torch.ones(1, 3, 28, 28))
    shutil.rmtree(tower)
    bundled = load(moved)
    assert bundled.location.directory == moved / "vision_tower"
    assert bundled.location.origin == str(tower)
    assert torch.equal(bundled(torch.ones(1, 3, 28, 28)), features)
    assert (
        f"from {moved / 'vision_tower'} (in {moved}/vision_tower)"
        in capsys.readouterr().out
    )


def test_found_in_the_registry_by_its_hash(mine, world):
    tower, checkpoint = mine
    shutil.rmtree(tower)
    towers.main_use([str(world.towers["other"])])
    towers.main_use([str(world.towers["clip"])])  # the same weights, elsewhere
    towers.main_use([str(world.towers["siglip"])])
    assert load(checkpoint).location.directory == world.towers["clip"]


@pytest.mark.both_stacks
def test_found_through_the_environment_by_its_hash(
    mine, world, tmp_path, monkeypatch, capsys
):
    """A tower that moved; another one there is refused, as everywhere."""
    tower, checkpoint = mine
    moved = shutil.move(tower, tmp_path / "moved")
    monkeypatch.setenv("LLM2CLIP_TOWER", str(moved))
    assert load(checkpoint).location.directory == moved
    assert f"from {moved} (LLM2CLIP_TOWER={moved})" in capsys.readouterr().out
    monkeypatch.setenv("LLM2CLIP_TOWER", str(world.towers["other"]))
    with pytest.raises(ContractError, match=r"LLM2CLIP_TOWER=.* has sha256"):
        load(checkpoint)


def test_another_tower_under_the_name_is_refused(mine, world):
    tower, checkpoint = mine
    wanted = hash_of(tower)
    shutil.rmtree(tower)
    shutil.copytree(world.towers["other"], tower)
    with pytest.raises(ContractError) as error:
        load(checkpoint)
    message = str(error.value)
    assert wanted in message
    assert hash_of(world.towers["other"]) in message
    assert "llm2clip llava bundle" in message


def test_another_choice_for_the_bare_name_is_refused(world, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    shutil.copytree(world.towers["clip"], mine)
    monkeypatch.setenv("LLM2CLIP_TOWER", str(mine))
    checkpoint = untrained(world, "llm2clip", tmp_path / "llava-bare")
    monkeypatch.setenv("LLM2CLIP_TOWER", str(world.towers["other"]))
    assert load(checkpoint).location.directory == mine  # where it was, it still is
    shutil.rmtree(mine)
    with pytest.raises(ContractError, match=hash_of(world.towers["other"])):
        load(checkpoint)
    towers.bundle(checkpoint, tower=str(world.towers["clip"]))
    assert load(checkpoint).location.directory == checkpoint / "vision_tower"


def test_bundle_refuses_what_is_not_the_checkpoints(mine, world):
    _, checkpoint = mine
    with pytest.raises(ContractError, match=hash_of(world.towers["other"])):
        towers.bundle(checkpoint, tower=str(world.towers["other"]))
    assert not (checkpoint / "vision_tower").exists()
    (checkpoint / "vision_tower").mkdir()
    (checkpoint / "vision_tower" / "something").write_text("of another program")
    with pytest.raises(FileExistsError):
        towers.bundle(checkpoint)


def test_lora_and_projector_checkpoints_find_their_own_bundle(mine):
    """Their configuration reaches the tower with the base model's path, so load_pretrained_model
    says theirs."""
    tower, checkpoint = mine
    towers.bundle(checkpoint)
    shutil.rmtree(tower)
    config = SimpleNamespace(**json.loads((checkpoint / "config.json").read_text()))
    config._name_or_path = "the/base-model"
    with pytest.raises(TowerNotFoundError):
        build_vision_tower(config, delay_load=True)
    with towers.loading(str(checkpoint)):
        tower = build_vision_tower(config, delay_load=True)
    assert tower.location.directory == checkpoint / "vision_tower"


def test_another_width_is_reported_before_the_projector_fails(mine, world):
    _, checkpoint = mine
    config = json.loads((checkpoint / "config.json").read_text())
    # as trained by LLaVA's own tower under a name that now means ours
    del config["llm2clip_tower"]
    config["mm_vision_tower"] = str(world.towers["wide"])
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ContractError,
        match=r"expects features of width 32, but the tower .* has hidden_size 48",
    ):
        load(checkpoint)


def test_a_projector_is_refused_with_another_tower_of_its_width(mine, world):
    _, pretrained = mine
    arguments = model_arguments(f"llm2clip:{world.towers['clip']}")
    projector = shutil.copy(world.projector(), pretrained / "mm_projector.bin")
    arguments.pretrain_mm_mlp_adapter = str(projector)
    build_vision_tower(arguments, delay_load=True)  # the same weights by another name
    other = world.towers["other"]
    arguments.vision_tower = f"llm2clip:{other}"
    with pytest.raises(ContractError, match=f"pretrained with.*{hash_of(other)}"):
        build_vision_tower(arguments, delay_load=True)
    arguments.pretrain_mm_mlp_adapter = str(world.projector())  # nothing known of it
    build_vision_tower(arguments, delay_load=True)


def test_a_model_keeps_its_tower_or_says_so(mine, world):
    """LLaVA would go on with the tower that the base model has and write the new name into the
    checkpoint."""
    tower, checkpoint = mine
    model = LlavaLlamaForCausalLM.from_pretrained(checkpoint)
    arguments = model_arguments(f"llm2clip:{world.towers['other']}")
    with pytest.raises(
        ContractError, match=f"already has the vision tower 'llm2clip:{tower}'"
    ):
        model.get_model().initialize_vision_modules(arguments)
    # the same weights by another name
    arguments.vision_tower = str(world.towers["clip"])
    model.get_model().initialize_vision_modules(arguments)
    assert model.config.llm2clip_tower["name"] == f"llm2clip:{world.towers['clip']}"


@pytest.mark.both_stacks
@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_a_plain_path_is_recorded_with_the_prefix(world, tmp_path, tower, monkeypatch):
    """Without this package, LLaVA would open the path as a CLIP, DINOv2's with random weights. A
    relative path becomes absolute: towers/NAME could be a Hub id."""
    path = str(world.towers[tower])
    folder, name = os.path.split(path)
    monkeypatch.chdir(os.path.dirname(folder))
    relative = os.path.join(os.path.basename(folder), name)
    checkpoint = untrained(world, relative, tmp_path / "llava-plain")
    config = json.loads((checkpoint / "config.json").read_text())
    assert (
        config["mm_vision_tower"]
        == config["llm2clip_tower"]["name"]
        == f"llm2clip:{path}"
    )
    loaded = load(checkpoint)
    assert (loaded.vision_tower_name, str(loaded.location.directory)) == (
        f"llm2clip:{path}",
        path,
    )
    assert loaded.location.card.family == tower
    llavas_own = build_vision_tower.__wrapped__
    with pytest.raises(ValueError, match=f"Unknown vision tower: llm2clip:{path}"):
        llavas_own(SimpleNamespace(**config))
    # what an earlier version recorded still opens
    config["mm_vision_tower"] = path
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert str(load(checkpoint).location.directory) == path
