"""LLaVA checkpoints as Hugging Face models: equal to LLaVA's own code, complete or not at all."""

import json
import shutil

import pytest
import torch
from llava.conversation import conv_templates
from safetensors.torch import load_file
from serve_checkpoints import V0_1, full, language_weights, projector_weights

from llava_integration.serve import parity
from llava_integration.serve.conversation import CONVERSATIONS, IMAGE
from llava_integration.serve.export import Export, export
from llm2clip_plugin.cli import main as llm2clip

CLIP = V0_1 / "towers" / "clip"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A full checkpoint with a CLIP tower, and its export."""
    root = tmp_path_factory.mktemp("exported")
    checkpoint = full(root / "llava-tiny", CLIP, llm2clip_conversation="v1")
    assert llm2clip(["llava", "export", str(checkpoint), "--output", str(root / "hf"), "--dtype", "bf16"]) == 0
    return checkpoint, root / "hf"


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "spaces"])
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_equals_llava(tmp_path, home, aspect, legacy):
    checkpoint = full(tmp_path / "llava-tiny", CLIP, image_aspect_ratio=aspect, legacy=legacy)
    made = Export.of(checkpoint, dtype="fp32")
    export(made, tmp_path / "hf")
    differences = parity.compare(made, tmp_path / "hf")
    assert differences.pixels <= 1e-6 and differences.logits <= 1e-4 and differences.answer > 3
    assert "greedy answer" in str(differences)


def test_names_and_rows(exported):
    """The names that servers know; every weight of LLaVA's bit for bit, and one more row."""
    tensors = load_file(exported[1] / "model.safetensors")
    own = language_weights() | projector_weights()
    assert torch.equal(tensors["multi_modal_projector.linear_2.bias"], own["model.mm_projector.2.bias"])
    for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        assert torch.equal(tensors[f"language_model.{name}"], own[name])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        rows = tensors[f"language_model.{name}"]
        assert len(rows) == 601 and torch.equal(rows[:600], own[name])
    tower = load_file(CLIP / "model.safetensors")
    assert {name.removeprefix("vision_tower.") for name in tensors if name.startswith("vision")} == set(tower)
    assert len(tensors) == len(own) + len(tower)


def test_config(exported):
    config = json.loads((exported[1] / "config.json").read_text())
    assert config["image_token_index"] == 600 and config["text_config"]["vocab_size"] == 601
    assert (config["image_seq_length"], config["vision_feature_layer"]) == (4, -2)
    assert config["vision_config"]["model_type"] == "clip_vision_model"
    assert config["llm2clip_export"]["conversation"] == "v1"
    assert config["llm2clip_tower"]["weights_sha256"] == config["llm2clip_export"]["tower_sha256"]
    processor = json.loads((exported[1] / "processor_config.json").read_text())
    assert (processor["patch_size"], processor["num_additional_image_tokens"]) == (8, 1)
    for path in exported[1].glob("*.*"):
        assert b"/tmp" not in path.read_bytes() and str(CLIP.parent).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_llavas(name):
    """Two rounds about an image, and a third that is asked."""
    from jinja2 import Environment

    said = ["What is it?", "A dog.", "Which\ncolor?", "Brown.", "Sure?"]
    conversation = conv_templates[name].copy()
    conversation.messages = []
    plain = name.endswith("plain")  # LLaVA's own text for it is of training: an image, then its caption
    for number, text in enumerate(said[:2] if plain else [*said, None]):
        image = ("<image>" if plain else "<image>\n") if number == 0 else ""
        conversation.append_message(conversation.roles[number % 2], None if text is None else image + text)
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(said[:2] if plain else said)
    ]
    messages[0]["content"] = [{"type": "text", "text": said[0]}, {"type": "image"}]
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(CONVERSATIONS[name].chat_template())
    expected = conversation.get_prompt() if not plain else f"{IMAGE}{said[0]}{said[1]}\n"
    assert template.render(messages=messages, add_generation_prompt=not plain) == expected


def refused(capsys, *words):
    """The one line that the command answers, and nothing is left of its output."""
    output = words[words.index("--output") + 1]
    assert llm2clip(["llava", "export", *map(str, words)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert not output.exists() and not list(output.parent.glob(f".{output.name}*"))
    return message


def damage(folder, name):
    """One of the ways in which a checkpoint is not whole."""
    weights = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    if name == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif name == "gone":
        weights.unlink()
    elif name == "shard":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
        weights.unlink()
    elif name == "tokenizer":
        (folder / "tokenizer.model").unlink()
    elif name == "no json":
        (folder / "config.json").write_text("{")
    else:
        key, value = {
            "layers": ("num_hidden_layers", 3),
            "width": ("mm_hidden_size", 48),
            "projector": ("mm_projector_type", "linear"),
            "foreign": ("model_type", "qwen2_vl"),
            "next": ("image_aspect_ratio", "anyres"),
            "scales": ("s2", True),
            "tower": ("mm_vision_tower", "llm2clip:/nowhere/tower"),
            "own tower": ("mm_vision_tower", "/nowhere/clip"),
        }[name]
        (folder / "config.json").write_text(json.dumps({**config, key: value}))


@pytest.mark.parametrize(
    "name, said",
    {
        "cut": "is not a complete safetensors file",
        "gone": "no checkpoint in",
        "shard": "which its index lists",
        "tokenizer": "no tokenizer.model in",
        "no json": "is not valid JSON",
        "layers": "9 of 34 tensors are missing, such as model.layers.2.self_attn.q_proj.weight",
        "width": "expects features of width 48, but the tower",
        "projector": "mm_projector_type is 'linear'",
        "foreign": "model_type is 'qwen2_vl'",
        "next": "LLaVA-NeXT, not LLaVA 1.5",
        "scales": "features of several scales",
        "tower": "'/nowhere/tower' is not a directory",
        "own tower": "/nowhere/clip is not a file, a directory or a Hub id",
    }.items(),
)
def test_damaged_and_foreign_checkpoints(tmp_path, home, capsys, name, said):
    checkpoint = full(tmp_path / "llava-tiny", CLIP)
    damage(checkpoint, name)
    assert said in refused(capsys, checkpoint, "--output", tmp_path / "hf")


def test_another_conversation_is_refused(exported, tmp_path, capsys):
    out = tmp_path / "hf"
    assert "was trained with the conversation 'v1'" in refused(
        capsys, exported[0], "--conv-mode", "llava_v0", "--output", out
    )
    assert "did you mean 'vicuna_v1'" in refused(capsys, exported[0], "--conv-mode", "vicuna", "--output", out)
    assert "is a Hugging Face model already" in refused(capsys, exported[1], "--output", out)


def test_a_difference_is_refused(exported, tmp_path, home, monkeypatch, capsys):
    """A model that computes something else never gets its name."""
    checkpoint = shutil.copytree(exported[0], tmp_path / "llava-tiny")
    monkeypatch.setattr(
        "llava_integration.serve.language.PROJECTOR",
        {"mm_projector.0": "multi_modal_projector.linear_2", "mm_projector.2": "multi_modal_projector.linear_1"},
    )
    assert "differs from LLaVA's own code" in refused(capsys, checkpoint, "--output", tmp_path / "hf")
