"""LLaVA's own stages with ``--vision_tower llm2clip``: training, loading, losses equal to its own
tower's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llava_integration.plug.resumed_data import BASE, model_record
from llm2clip_plugin.contracts import TowerCard

# A process that imports llava alone: loads each checkpoint as LLaVA's programs do and answers a
# question.
GENERATE = """
import sys, json, torch
from PIL import Image
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
image = Image.open(sys.argv[1]).convert("RGB")
for path, base in json.loads(sys.argv[2]):
    name = get_model_name_from_path(path)
    tokenizer, model, processor, _ = load_pretrained_model(path, base, name)
    if torch.__version__.startswith("2.1."):  # its convolutions know no float16 on a CPU
        model.float()
    tower = model.get_vision_tower()
    ids = tokenizer_image_token("<image>\\nWhich colour?", tokenizer, return_tensors="pt")[None]
    pixels = process_images([image], processor, model.config).to(model.dtype)
    options = dict(image_sizes=[image.size], do_sample=False, max_new_tokens=4)
    output = model.generate(ids, images=pixels, **options)
    print(json.dumps([name, type(tower).__name__, tower.vision_tower_name, list(output.shape)]))
"""


def projector(folder):
    return ("--pretrain_mm_mlp_adapter", str(folder / "mm_projector.bin"))


@pytest.fixture(scope="session")
def trained(world):
    """Pretrain, finetune and LoRA finetune by ``llm2clip``, in one process each; folder by name,
    losses by name."""
    chosen = {"LLM2CLIP_TOWER": str(world.towers["clip"])}
    folders = {
        kind: world.root / f"llava-tiny-{kind}"
        for kind in ("pretrain", "finetune", "lora")
    }
    losses = {
        "pretrain": world.stage("pretrain", "llm2clip", folders["pretrain"], **chosen)
    }
    for kind in ("finetune", "lora"):
        losses[kind] = world.stage(
            kind, "llm2clip", folders[kind], *projector(folders["pretrain"]), **chosen
        )
    return folders, losses


def weights(folder):
    """Every tensor of a saved model, by name."""
    tensor_of = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            tensor_of |= {name: tensors.get_tensor(name) for name in tensors.keys()}
    return tensor_of


def test_the_checkpoint_remembers_its_tower(world, trained):
    card = TowerCard.read(world.towers["clip"] / TowerCard.FILE)
    for folder in trained[0].values():
        config = json.loads((folder / "config.json").read_text())
        assert config["mm_vision_tower"] == "llm2clip"
        recorded = {
            "weights_sha256": card.weights_sha256,
            "origin": str(world.towers["clip"].resolve()),
        }
        recorded |= {
            "name": "llm2clip",
            "family": "clip",
            "image_size": 28,
            "mm_hidden_size": 32,
        }
        assert config["llm2clip_tower"] == recorded
    adapter = weights(trained[0]["lora"])
    assert adapter
    assert not any("vision_tower" in name for name in adapter)


def test_a_process_that_imports_only_llava_loads_and_answers(world, trained):
    folders, _ = trained
    bases = {"finetune": None, "lora": str(world.llm), "pretrain": str(world.llm)}
    checkpoints = [(str(folders[kind]), base) for kind, base in bases.items()]
    image = next(world.images.iterdir())
    output = world.forked(
        "-c",
        GENERATE,
        image,
        json.dumps(checkpoints),
        LLM2CLIP_TOWER=str(world.towers["clip"]),
    )
    rows = [
        json.loads(line) for line in output.splitlines() if line.startswith('["llava')
    ]
    assert [row[:3] for row in rows] == [
        [folders[kind].name, "LLM2CLIPVisionTower", "llm2clip"] for kind in bases
    ]
    # a start token and four more at most
    assert all(row[3][0] == 1 and 1 <= row[3][1] <= 5 for row in rows)


def test_losses_and_weights_equal_llavas_own_tower(world, trained, tmp_path):
    """The same finetune by LLaVA's CLIPVisionTower on the same directory, our hook off: nothing
    differs by a bit."""
    folders, losses = trained
    theirs = tmp_path / "llava-theirs"
    their_losses = world.stage(
        "finetune",
        str(world.towers["clip"]),
        theirs,
        *projector(folders["pretrain"]),
        LLM2CLIP_LLAVA_HOOK="0",
    )
    assert their_losses == losses["finetune"]
    ours = weights(folders["finetune"])
    their_weights = weights(theirs)
    # We don't keep the block above the selected state.
    assert {name for name in their_weights if name not in ours} == {
        name for name in their_weights if ".encoder.layers.2." in name
    }
    assert len(ours) > 40
    assert all(
        torch.equal(tensor, their_weights[name]) for name, tensor in ours.items()
    )


def test_a_trained_llava_is_trained_further(world, trained, tmp_path):
    """With its tower, which the environment unfreezes; a training is resumed with its own tower
    alone."""
    folder = trained[0]["finetune"]
    further = tmp_path / "llava-further"
    chosen = {
        "LLM2CLIP_UNFREEZE_TOWER": "1",
        "LLM2CLIP_TOWER": str(world.towers["clip"]),
    }
    world.stage(
        "finetune", "llm2clip", further, "--model_name_or_path", str(folder), **chosen
    )
    name = (
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    )
    assert not torch.equal(weights(further)[name], weights(folder)[name])
    shutil.copytree(folder, tmp_path / "llava-other" / "checkpoint-3")
    with pytest.raises(
        AssertionError, match="checkpoint-3 was trained with the vision tower"
    ):
        world.stage(
            "finetune", f"llm2clip:{world.towers['other']}", tmp_path / "llava-other"
        )


def test_a_lora_checkpoint_is_resumed_with_its_own_tower_data_and_model_alone(
    world, trained, tmp_path
):
    """PEFT writes no config.json into it, so our own file names the tower."""
    output = tmp_path / "llava-lora-again"
    # without the config.json that names its tower: another tower may start from it
    alone = tmp_path / "projector"
    alone.mkdir()
    shutil.copy(trained[0]["pretrain"] / "mm_projector.bin", alone)
    words = (
        *projector(alone),
        *"--save_strategy steps --save_steps 1 --save_total_limit 1".split(),
    )
    world.stage("lora", f"llm2clip:{world.towers['clip']}", output, *words)
    (checkpoint,) = output.glob("checkpoint-*")
    assert not (checkpoint / "config.json").exists()
    with pytest.raises(
        AssertionError, match=f"{checkpoint.name} was trained with the vision tower"
    ):
        world.stage("lora", f"llm2clip:{world.towers['other']}", output, *words)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(world.finetune_data.read_text())[::-1]))
    on_other = (*words, "--data_path", str(other))
    with pytest.raises(
        AssertionError, match=f"{checkpoint.name} was trained on .*, and LLaVA would"
    ):
        world.stage("lora", f"llm2clip:{world.towers['clip']}", output, *on_other)
    model = tmp_path / "vicuna"
    shutil.copytree(world.llm, model)
    tensors = {name: tensor + 0.01 for name, tensor in weights(model).items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    from_other = (*words, "--model_name_or_path", str(model))
    with pytest.raises(
        AssertionError, match=f"{checkpoint.name} was trained from {world.llm} "
    ):
        world.stage("lora", f"llm2clip:{world.towers['clip']}", output, *from_other)
    config = json.loads((output / "config.json").read_text())
    assert config[BASE] == model_record(str(world.llm))


@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_under_deepspeed(world, trained, tmp_path, zero):
    """ZeRO-2, and ZeRO-3 under the launcher, by the script's path; the checkpoint holds the tower
    whole, and loads."""
    import llava.train

    pretrained = projector(trained[0]["pretrain"])
    chosen = {"LLM2CLIP_TOWER": str(world.towers["clip"])}
    ours = tmp_path / "llava-ours"
    launched = (Path(llava.train.__path__[0]) / "train.py",) if zero == 3 else ()
    under = {"ranks": 2, "zero": zero}
    losses = world.stage(
        "finetune",
        "llm2clip",
        ours,
        *pretrained,
        **under,
        launched=launched,
        forked=True,
        **chosen,
    )
    assert len(losses) == 3
    saved = weights(ours)
    for name, tensor in weights(world.towers["clip"]).items():
        # gathered out of the ranks' parts, and untouched by training
        if ".encoder.layers.2." not in name:
            assert torch.equal(
                saved[f"model.vision_tower.vision_tower.{name}"], tensor.bfloat16()
            ), name
    image = next(world.images.iterdir())
    output = world.forked(
        "-c", GENERATE, image, json.dumps([(str(ours), None)]), **chosen
    )
    assert '"llava-ours", "LLM2CLIPVisionTower"' in output
    # where other people's towers break: the same losses and weights as LLaVA's own tower gives
    if zero == 3:
        theirs = tmp_path / "llava-theirs"
        off = {"LLM2CLIP_LLAVA_HOOK": "0"}
        path = str(world.towers["clip"])
        assert losses == world.stage(
            "finetune", path, theirs, *pretrained, **under, **off
        )
        their_weights = weights(theirs)
        assert all(
            torch.equal(tensor, their_weights[name]) for name, tensor in saved.items()
        )


@pytest.mark.parametrize("kind, ranks", [("finetune", 0), ("lora", 0), ("finetune", 2)])
def test_a_trained_tower_comes_back(world, tmp_path, kind, ranks):
    """Unfrozen, the tower trains with LLaVA (under ZeRO-3 too), its weights are kept and are what
    the load gives."""
    output = tmp_path / f"llava-unfrozen-{kind}"
    tower = f"llm2clip:{world.towers['clip']}"
    world.stage(kind, tower, output, ranks=ranks, zero=3, LLM2CLIP_UNFREEZE_TOWER="1")
    assert (
        json.loads((output / "config.json").read_text())["unfreeze_mm_vision_tower"]
        is True
    )
    prefix = "model.vision_tower."
    if kind == "finetune":
        kept = {
            name.removeprefix(prefix): t
            for name, t in weights(output).items()
            if name.startswith(prefix)
        }
    else:
        state = torch.load(output / "non_lora_trainables.bin", weights_only=True)
        kept = {
            name.partition(prefix)[2]: tensor
            for name, tensor in state.items()
            if prefix in name
        }
    before = {
        f"vision_tower.{name}": tensor
        for name, tensor in weights(world.towers["clip"]).items()
    }
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(kept[name].float(), before[name].bfloat16().float()), (
        "the tower did not train"
    )
    code = (
        "import sys, torch\nfrom llava.model.builder import load_pretrained_model\n"
        "_, model, _, _ = load_pretrained_model(sys.argv[1], sys.argv[2] or None, sys.argv[3])\n"
        "torch.save({k: v.float() for k, v in model.get_vision_tower().state_dict().items()}, "
        "sys.argv[4])"
    )
    base = "" if kind == "finetune" else world.llm
    world.forked("-c", code, output, base, output.name, tmp_path / "loaded.pt")
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    assert set(loaded) == set(kept)
    for name, tensor in kept.items():
        # LLaVA loads in float16: 2^-11 of a value, 2^-25 of the smallest ones.
        torch.testing.assert_close(
            loaded[name], tensor.float(), rtol=2**-11, atol=2**-25
        )


def test_s2_trains_and_its_scales_come_back(world, tmp_path):
    output = tmp_path / "llava-s2"
    world.stage(
        "finetune",
        f"llm2clip:{world.towers['clip']}",
        output,
        LLM2CLIP_S2_SCALES="28,56",
    )
    config = json.loads((output / "config.json").read_text())
    assert (config["s2"], config["s2_scales"], config["mm_hidden_size"]) == (
        True,
        "28,56",
        64,
    )
    printed = world.forked(
        "-c", GENERATE, next(world.images.iterdir()), json.dumps([(str(output), None)])
    )
    assert "MultiscaleVisionTower" in printed
