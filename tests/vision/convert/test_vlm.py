"""``llm2clip import VLM --part vision``: the tower of a vision-language model, without the rest."""

import fnmatch
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llm2clip_plugin import load_tower
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.convert import importing as command
from llm2clip_plugin.vision.convert import vlm
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder

from ..conftest import TRANSFORMERS_TOWERS, read

IS_OLD = int(transformers.__version__.split(".")[0]) < 5
needs_transformers_5 = pytest.mark.skipif(IS_OLD, reason="transformers 4")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
VISION = {**SIZES, "num_hidden_layers": 3, "image_size": 28, "patch_size": 7}
TEXT = {**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": 64}
NO_HEAD = {**VISION, "vision_use_head": False}


def llava():
    vision = transformers.CLIPVisionConfig(**VISION)
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    return transformers.LlavaForConditionalGeneration(config)


def onevision():
    vision = transformers.SiglipVisionConfig(**NO_HEAD)
    text = transformers.Qwen2Config(**TEXT)
    config = transformers.LlavaOnevisionConfig(vision_config=vision, text_config=text)
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def paligemma():
    vision = transformers.SiglipVisionConfig(**NO_HEAD)
    text = transformers.GemmaConfig(**TEXT, head_dim=16)
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=32
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def internvl():
    vision = transformers.InternVLVisionConfig(**VISION)
    text = transformers.Qwen2Config(**TEXT)
    config = transformers.InternVLConfig(vision_config=vision, text_config=text)
    return transformers.InternVLForConditionalGeneration(config)


def llava_next():
    vision = transformers.CLIPVisionConfig(**VISION)
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaNextConfig(
        vision_config=vision, text_config=text, image_grid_pinpoints=[[28, 56]]
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def gemma3():
    vision = transformers.SiglipVisionConfig(**NO_HEAD)
    text = transformers.Gemma3TextConfig(**TEXT, head_dim=16)
    config = transformers.Gemma3Config(
        vision_config=vision, text_config=text, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen3_vl():
    vision = {**SIZES, "depth": 2, "num_heads": 2, "patch_size": 4}
    vision |= {"num_position_embeddings": 36, "out_hidden_size": 32}
    text = {**TEXT, "head_dim": 16}
    config = transformers.Qwen3VLConfig(vision_config=vision, text_config=text)
    return transformers.Qwen3VLForConditionalGeneration(config)


# model -> family, model_type of the whole
MODELS = {
    llava: ("clip", "llava"),
    llava_next: ("clip", "llava_next"),
    gemma3: ("siglip", "gemma3"),
    onevision: ("siglip", "llava_onevision"),
    paligemma: ("siglip", "paligemma"),
    internvl: ("internvl", "internvl"),
}


def publish(make, folder: Path):
    """Save a random model of transformers in shards of a few tensors; its vision model."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # so that class token and positions matter
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="20KB")
    return getattr(model.model, "vision_tower", None)


def files_with(folder: Path, part: str) -> set[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return {file for name, file in index["weight_map"].items() if part in name}


@needs_transformers_5
@pytest.mark.parametrize("make", MODELS)
def test_states_are_those_of_the_models_own_tower(make, tmp_path):
    """From shards of which those of the language model are missing: they are not read."""
    original = publish(make, tmp_path / "vlm")
    needed = files_with(tmp_path / "vlm", "vision_tower.")
    others = files_with(tmp_path / "vlm", "") - needed
    assert others
    for file in others:
        (tmp_path / "vlm" / file).unlink()
    family, kind = MODELS[make]
    card, report = import_tower(tmp_path / "vlm", tmp_path / "tower", part="vision")
    assert card.family == family
    assert card.num_patches == 16
    assert report[0].startswith(f"vision part of a {kind}: ")
    pixels = torch.randn(2, 3, 28, 28)
    tower = load_tower(tmp_path / "tower")
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        expected = original(pixels, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == 4
    for state, other in zip(states, expected, strict=True):
        assert torch.equal(state, other)


@needs_transformers_5
@pytest.mark.parametrize("part", ["", "vision"])
def test_code_that_the_model_names_is_not_passed_on(part, tmp_path):
    """Whoever opens the tower, or an export of it, with ``trust_remote_code`` would run it."""
    model = llava()
    if not part:
        model = model.model.vision_tower
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    named = config["vision_config"] if part else config
    named["auto_map"] = {"AutoConfig": "someone/name--code.Config"}
    file.write_text(json.dumps(config))
    import_tower(tmp_path / "model", tmp_path / "tower", part=part)
    assert "auto_map" not in (tmp_path / "tower" / "config.json").read_text()


@needs_transformers_5
def test_qwen3_vl_is_read_with_and_without_the_option(tmp_path):
    publish(qwen3_vl, tmp_path / "vlm")
    whole, _ = import_tower(tmp_path / "vlm", tmp_path / "whole")
    for file in files_with(tmp_path / "vlm", "") - files_with(
        tmp_path / "vlm", "visual."
    ):
        (tmp_path / "vlm" / file).unlink()
    card, _ = import_tower(tmp_path / "vlm", tmp_path / "part", part="vision")
    assert card.family == "timm"
    assert card.weights_sha256 == whole.weights_sha256


@needs_transformers_5
def test_opengvlabs_own_internvl(tmp_path):
    """Its tower's names below ``vision_model.``; no code of the folder is run."""
    torch.manual_seed(0)
    width = 32
    state = {
        "embeddings.class_embedding": torch.randn(1, 1, width),
        "embeddings.position_embedding": torch.randn(1, 17, width),
        "embeddings.patch_embedding.weight": torch.randn(width, 3, 7, 7),
        "embeddings.patch_embedding.bias": torch.randn(width),
    }
    shapes = {"ls1": (width,), "ls2": (width,), "attn.qkv.weight": (3 * width, width)}
    shapes |= {"attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
    shapes |= {"norm1.weight": (width,), "norm2.weight": (width,)}
    shapes |= {"mlp.fc1.weight": (48, width), "mlp.fc1.bias": (48,)}
    shapes |= {"mlp.fc2.weight": (width, 48), "mlp.fc2.bias": (width,)}
    for name, shape in shapes.items():
        state[f"encoder.layers.0.{name}"] = torch.randn(*shape)
    whole = {f"vision_model.{name}": value for name, value in state.items()}
    whole |= {
        "language_model.lm_head.weight": torch.ones(1),
        "mlp1.0.bias": torch.ones(1),
    }
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    vision = {"model_type": "intern_vit_6b", "num_attention_heads": 2}
    config = {"model_type": "internvl_chat", "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"--part vision .* tower \(intern_vit_6b\)"):
        import_tower(tmp_path, tmp_path / "tower")
    card, report = import_tower(tmp_path, tmp_path / "tower", part="vision")
    assert (card.family, card.num_patches) == ("internvl", 16)
    assert report[0].endswith(f": {len(state)} of {len(whole)} tensors, vision_model.*")
    tensors = load_file(tmp_path / "tower" / "model.safetensors")
    fused = state["encoder.layers.0.attn.qkv.weight"]
    keys = tensors["encoder.layer.0.attention.k_proj.weight"]
    assert torch.equal(keys, fused[width : 2 * width])


def test_a_siglip_without_its_pooling_head_has_the_same_states(tmp_path):
    source = TRANSFORMERS_TOWERS / "siglip_vision"
    state = read(source, "model.safetensors")
    rest = {name: value for name, value in state.items() if ".head." not in name}
    assert len(rest) < len(state)
    save_file(rest, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "vision_use_head": False})
    )
    import_tower(tmp_path, tmp_path / "tower")
    size = config["image_size"]
    pixels = torch.randn(1, 3, size, size)
    with torch.no_grad():
        output = load_tower(tmp_path / "tower")(pixels, output_hidden_states=True)
        expected = load_tower(source)(pixels, output_hidden_states=True)
    assert output.pooler_output is None
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)


@needs_transformers_5
def test_without_the_option_the_command_is_named(tmp_path):
    publish(paligemma, tmp_path / "vlm")
    message = (
        r"describes a paligemma model, .* `llm2clip import SOURCE --part vision "
        r"--output DIR` takes out its tower \(siglip_vision_model\)"
    )
    with pytest.raises(ValueError, match=message):
        load_tower(tmp_path / "vlm")
    with pytest.raises(ValueError, match=message):
        import_tower(tmp_path / "vlm", tmp_path / "tower")


@needs_transformers_5
def test_from_the_hub_only_its_shards_are_downloaded(tmp_path, monkeypatch, capsys):
    publish(llava, tmp_path / "hub")
    processor = {"image_processor": {"image_mean": [0.4, 0.5, 0.6]}}
    (tmp_path / "hub" / "processor_config.json").write_text(json.dumps(processor))
    cache = tmp_path / "cache"
    cache.mkdir()

    def snapshot(name, *, patterns):
        assert name == "me/vlm"
        for file in (tmp_path / "hub").iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns):
                shutil.copy(file, cache)
        return cache

    monkeypatch.setattr(vlm, "hub_snapshot", snapshot)
    arguments = ["me/vlm", "--part", "vision", "--output", str(tmp_path / "tower")]
    assert command.main(arguments) == 0
    assert "vision part of a llava" in capsys.readouterr().out
    downloaded = {file.name for file in cache.glob("*.safetensors")}
    assert downloaded == files_with(tmp_path / "hub", "vision_tower.")
    settings = json.loads((tmp_path / "tower/preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.4, 0.5, 0.6]


@needs_transformers_5
def test_a_siglip_without_its_pooling_head_pools_the_mean(tmp_path):
    publish(paligemma, tmp_path / "vlm")
    import_tower(tmp_path / "vlm", tmp_path / "tower", part="vision")
    tower = load_tower(tmp_path / "tower")
    with pytest.raises(ValueError, match=r"no pooling head .* set --dual\.pool mean"):
        DualEncoder(tower, DualConfig(projection_dim=8))
    dual = DualEncoder(tower, DualConfig(projection_dim=8, pool="mean"))
    assert dual.encode_image(torch.randn(1, 3, 28, 28)).shape == (1, 8)


def llava_checkpoint(folder: Path, tower: str, *, is_pickle: bool = False) -> dict:
    """A checkpoint as LLaVA's own code writes one whose CLIP was trained; the CLIP's tensors."""
    clip = read(TRANSFORMERS_TOWERS / "clip_vision", "model.safetensors")
    state = {f"model.vision_tower.vision_tower.{name}": v for name, v in clip.items()}
    state |= {"lm_head.weight": torch.zeros(4, 4)}
    state |= {"model.mm_projector.0.weight": torch.zeros(4, 4)}
    folder.mkdir()
    config = {"model_type": "llava_llama", "mm_vision_tower": tower}
    (folder / "config.json").write_text(json.dumps(config))
    if is_pickle:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return clip


def test_the_trained_tower_of_llavas_own_checkpoint(tmp_path):
    clip = TRANSFORMERS_TOWERS / "clip_vision"
    state = llava_checkpoint(tmp_path / "llava", f"llm2clip:{clip}")
    card, _ = import_tower(tmp_path / "llava", tmp_path / "tower", part="vision")
    assert card.family == "clip"
    written = load_file(tmp_path / "tower" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())


@pytest.mark.skipif(IS_OLD, reason="its torch does not read pickles safely")
def test_llavas_checkpoint_that_does_not_tell_sizes_takes_a_config(tmp_path):
    llava_checkpoint(tmp_path / "llava", "elsewhere/clip", is_pickle=True)
    with pytest.raises(
        ValueError, match="mm_vision_tower 'elsewhere/clip', which does not"
    ):
        import_tower(tmp_path / "llava", tmp_path / "tower", part="vision")
    clip = TRANSFORMERS_TOWERS / "clip_vision"
    given = {"part": "vision", "config": clip / "config.json"}
    card, _ = import_tower(tmp_path / "llava", tmp_path / "tower", **given)
    same, _ = import_tower(clip, tmp_path / "same")
    assert card.weights_sha256 == same.weights_sha256


def test_llavas_names_of_openais_towers_tell_sizes():
    config = {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    fields = vlm.settings_inside(Path("llava"), config, {})
    assert (fields["model_type"], fields["image_size"]) == ("clip_vision_model", 336)


NO_TOWER = {
    "llava_llama": (
        {"mm_vision_tower": "openai/clip-vit-large-patch14-336"},
        r"saves only if it was trained; import its tower itself: openai/clip-vit-large",
    ),
    "llama": ({}, "a llama without a vision part; none of its tensors is named model"),
    "mistral3": (
        {"vision_config": {"model_type": "pixtral"}},
        r"whose tower \(pixtral\) is of no family here: pass the vision model that it",
    ),
    "perception_lm": (
        {"vision_config": {"model_type": "timm_wrapper", "architecture": "vit_pe_x"}},
        r"whose tower \(timm_wrapper\) is of no family here: pass timm:vit_pe_x, if",
    ),
    "qwen2_vl": (
        {"vision_config": {"depth": 32}},
        r"whose tower \(qwen2_vl\) is of no family here: pass the vision model that it",
    ),
}


@pytest.mark.parametrize("kind", NO_TOWER)
def test_a_model_without_a_tower_of_ours_is_refused(kind, tmp_path):
    fields, message = NO_TOWER[kind]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **fields}))
    save_file({"lm_head.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        import_tower(tmp_path, tmp_path / "tower", part="vision")


def test_other_parts_are_refused():
    with pytest.raises(ValueError, match="--part"):
        command.main(["x", "--part", "audio", "--output", "y"])


def test_a_missing_shard_is_named(tmp_path):
    llava_checkpoint(tmp_path / "llava", str(TRANSFORMERS_TOWERS / "clip_vision"))
    state = load_file(tmp_path / "llava" / "model.safetensors")
    shard = "model-00001-of-00002.safetensors"
    index = {"weight_map": dict.fromkeys(state, shard)}
    index_file = tmp_path / "llava" / "model.safetensors.index.json"
    index_file.write_text(json.dumps(index))
    (tmp_path / "llava" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard} is missing, which the index"):
        import_tower(tmp_path / "llava", tmp_path / "tower", part="vision")


PICKLE = pytest.param(
    "pytorch_model.bin",
    marks=pytest.mark.skipif(IS_OLD, reason="its torch does not read pickles safely"),
)


@pytest.mark.parametrize("shard", ["model.safetensors", PICKLE])
def test_a_tensor_that_only_the_index_has_is_named(shard, tmp_path):
    clip = str(TRANSFORMERS_TOWERS / "clip_vision")
    folder = tmp_path / "llava"
    state = llava_checkpoint(folder, clip, is_pickle=shard.endswith(".bin"))
    prefix = "model.vision_tower.vision_tower."
    names = [f"{prefix}{name}" for name in [*state, "absent"]]
    other = f"other{Path(shard).suffix}"
    (folder / shard).rename(folder / other)
    index = {"weight_map": dict.fromkeys(names, other)}
    (folder / f"{shard}.index.json").write_text(json.dumps(index))
    message = rf"{other} has no tensor {prefix}absent, which the index of .* says"
    with pytest.raises(ContractError, match=message):
        import_tower(folder, tmp_path / "tower", part="vision")


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_vision_model_alone_needs_no_part(prefix, tmp_path):
    source = TRANSFORMERS_TOWERS / "clip_vision"
    state = read(source, "model.safetensors")
    renamed = {}
    for name, value in state.items():
        renamed[prefix + name.removeprefix("vision_model.")] = value
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(source / "config.json", tmp_path)
    message = r"is a vision model \(clip_vision_model\), .*; leave out --part"
    with pytest.raises(ValueError, match=message):
        import_tower(tmp_path, tmp_path / "tower", part="vision")


@pytest.mark.parametrize("option", ["part", "config"])
def test_a_tower_directory_takes_no_part_or_config(option, tmp_path):
    import_tower(TRANSFORMERS_TOWERS / "clip_vision", tmp_path / "tower")
    values = {"part": "vision", "config": tmp_path / "tower" / "config.json"}
    with pytest.raises(ValueError, match=r"is a tower directory, .*; remove --config"):
        import_tower(tmp_path / "tower", tmp_path / "x", **{option: values[option]})


def test_a_missing_config_is_named_as_missing(tmp_path):
    folder = tmp_path / "llava"
    llava_checkpoint(folder, "elsewhere/clip")
    (folder / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"llava: config.json, .* is missing; pass the"
    ):
        import_tower(folder, tmp_path / "tower", part="vision")
    file = folder / "model.safetensors"
    with pytest.raises(ValueError, match="a file of weights does not tell the tower's"):
        import_tower(file, tmp_path / "tower", part="vision")


@pytest.mark.parametrize("vision", [None, {}])
def test_an_empty_vision_config_is_said_to_be_empty(vision, tmp_path):
    folder = tmp_path / "llava"
    llava_checkpoint(folder, "")
    config = {"model_type": "llava", "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vision_config is empty, expected the tower"):
        import_tower(folder, tmp_path / "tower", part="vision")
    given = {
        "part": "vision",
        "config": TRANSFORMERS_TOWERS / "clip_vision/config.json",
    }
    card, _ = import_tower(folder, tmp_path / "tower", **given)
    assert card.family == "clip"
