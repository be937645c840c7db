"""LLaVA checkpoints as Hugging Face models: equal to LLaVA's own code, complete or not at all."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import serve_checkpoints
import torch
from llava.conversation import conv_templates
from safetensors.torch import load_file, save_file
from serve_checkpoints import (
    TODAY,
    base_model,
    full,
    language_weights,
    lora,
    projector_weights,
    tower_directory,
)
from transformers import LlavaForConditionalGeneration

from llava_integration.plug.resumed_data import BASE, model_record
from llava_integration.serve.build import register
from llava_integration.serve.export import Export, compare, export
from llava_integration.serve.prompt import CONVERSATIONS, chat_template
from llm2clip_plugin.cli import main as llm2clip

CLIP = tower_directory("clip")
# towers of today whose code is saved with the model
CODED = (
    "openvision",
    "dinov3",
    "radio",
    "pe_core",
    "dinov2_registers",
    "tipsv2",
    "qwen25",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A full checkpoint with a CLIP tower, and its export."""
    root = tmp_path_factory.mktemp("exported")
    checkpoint = full(root / "llava-tiny", CLIP, llm2clip_conversation="v1")
    assert (
        llm2clip(
            [
                "llava",
                "export",
                str(checkpoint),
                "--output",
                str(root / "hf"),
                "--dtype",
                "bf16",
            ]
        )
        == 0
    )
    return checkpoint, root / "hf"


def made(kind, tower, root, **changes):
    """A checkpoint of a kind."""
    folder = root / f"llava-{kind}"
    tower = tower_directory(tower)
    if kind == "full":
        return full(folder, tower, **changes)
    return lora(folder, tower, base_model(root / "vicuna"), **changes)


def check(checkpoint, output, dtype="fp32"):
    """Export it; what LLaVA's own code computes, to 1e-6 in pixels and 1e-4 in logits."""
    export_made = Export.of(checkpoint, dtype=dtype)
    export(export_made, output)
    said = compare(export_made, output)
    line = re.fullmatch(
        r"token ids equal, pixels within (\S+), logits within (\S+) .* of (\d+) tokens equal",
        said,
    )
    assert line is not None, said
    assert float(line[1]) <= 1e-6
    assert float(line[2]) <= 1e-4
    assert int(line[3]) > 3


@pytest.mark.both_stacks
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2", "eva02"])
def test_equals_llava(tmp_path, home, tower, aspect, kind):
    check(made(kind, tower, tmp_path, image_aspect_ratio=aspect), tmp_path / "hf")


@pytest.mark.both_stacks
def test_a_qlora_equals_llava(tmp_path, home):
    """Its config.json says how its base model was quantized in training."""
    trained = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    checkpoint = made("lora", "clip", tmp_path, quantization_config=trained)
    config = json.loads((checkpoint / "config.json").read_text())
    config["mm_vision_tower"] = f"llm2clip:{config['mm_vision_tower']}"
    serve_checkpoints.write_config(checkpoint, config)
    check(checkpoint, tmp_path / "hf")


@pytest.mark.both_stacks
@pytest.mark.parametrize("tower", TODAY)
def test_towers_of_today_equal_llava(tmp_path, home, tower):
    check(made("full", tower, tmp_path), tmp_path / "hf")


@pytest.mark.both_stacks
@pytest.mark.parametrize("tower", ["siglip", *({"radio"} & set(TODAY))])
def test_half_precision_equals_llava(tmp_path, home, tower):
    """RADIO's file has the pixels' mean and deviation, which half precision rounds, too."""
    check(made("full", tower, tmp_path), tmp_path / "hf", dtype="fp16")


def test_a_tokenizer_that_is_not_legacy_equals_llavas(tmp_path, home):
    """Vicuna 1.5's, whose text after special tokens has no space before it."""
    check(full(tmp_path / "llava-tiny", CLIP, legacy=False), tmp_path / "hf")


@pytest.mark.both_stacks
def test_an_unfrozen_towers_weights_are_the_checkpoints(tmp_path, home):
    checkpoint = full(tmp_path / "llava-tiny", CLIP, unfreeze_mm_vision_tower=True)
    weights = load_file(checkpoint / "model.safetensors")
    name = "vision_model.embeddings.class_embedding"
    inside = "model.vision_tower.vision_tower."
    trained = {
        f"{inside}{key}": value
        for key, value in load_file(CLIP / "model.safetensors").items()
    }
    trained[f"{inside}{name}"] += 1
    save_file(weights | trained, checkpoint / "model.safetensors", {"format": "pt"})
    export(Export.of(checkpoint, dtype="fp32"), tmp_path / "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")[f"vision_tower.{name}"]
    assert torch.equal(written, trained[f"{inside}{name}"])


@pytest.mark.both_stacks
def test_code_of_the_tower_travels_with_the_model(tmp_path, home):
    """trust_remote_code opens towers where this package is not installed; in fp16, with pixels in
    fp32."""
    program = """
import sys
sys.modules["llm2clip_plugin"] = sys.modules["llava_integration"] = None
import torch, transformers
auto = getattr(transformers, "AutoModelForImageTextToText", None)
auto = auto or transformers.AutoModelForVision2Seq
for folder in sys.argv[1:]:
    model = auto.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float16).eval()
    assert type(model).__name__ == "LlavaTowerForConditionalGeneration"
    with torch.inference_mode():
        torch.save(model(**torch.load(f"{folder}/inputs.pt")).logits, f"{folder}/logits.pt")
"""
    folders = []
    expected = []
    for tower in ("eva02", *(name for name in CODED if name in TODAY)):
        folder = tmp_path / f"hf_{tower}"
        export(Export.of(made("full", tower, tmp_path / tower)), folder)
        config = json.loads((folder / "config.json").read_text())
        size = config["vision_config"]["image_size"]
        count = config["image_seq_length"] if serve_checkpoints.IS_NEW else 1
        inputs = {"input_ids": torch.tensor([[1, 300, *[600] * count, 301]])}
        inputs |= {
            "pixel_values": torch.rand(1, 3, size, size),
            "attention_mask": torch.ones(1, count + 3).long(),
        }
        torch.save(inputs, folder / "inputs.pt")
        register()
        model = LlavaForConditionalGeneration.from_pretrained(
            folder, torch_dtype=torch.float16
        ).eval()
        with torch.inference_mode():
            expected.append(model(**inputs).logits)
        folders.append(folder)
    done = subprocess.run(
        [sys.executable, "-c", program, *folders],
        capture_output=True,
        text=True,
        check=False,
        # of the program alone: transformers keeps what it reads first for the whole process
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr
    for folder, logits in zip(folders, expected, strict=True):
        assert torch.allclose(torch.load(folder / "logits.pt"), logits, atol=1e-2), (
            folder
        )


def test_names_and_rows(exported):
    """The names that servers know; every weight of LLaVA's bit for bit, and one more row."""
    tensors = load_file(exported[1] / "model.safetensors")
    llavas = language_weights() | projector_weights()
    assert torch.equal(
        tensors["multi_modal_projector.linear_2.bias"],
        llavas["model.mm_projector.2.bias"],
    )
    for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        assert torch.equal(tensors[f"language_model.{name}"], llavas[name])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        rows = tensors[f"language_model.{name}"]
        assert len(rows) == 601
        assert torch.equal(rows[:600], llavas[name])
    tower = load_file(CLIP / "model.safetensors")
    assert {
        name.removeprefix("vision_tower.")
        for name in tensors
        if name.startswith("vision")
    } == set(tower)
    assert len(tensors) == len(llavas) + len(tower)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_llavas(name):
    """Two rounds about an image, and a third that is asked."""
    from jinja2 import Environment

    said = ["What is it?", "A dog.", "Which\ncolor?", "Brown.", "Sure?"]
    conversation = conv_templates[name].copy()
    conversation.messages = []
    for number, text in enumerate([*said, None]):
        image = "<image>\n" if number == 0 else ""
        conversation.append_message(
            conversation.roles[number % 2], None if text is None else image + text
        )
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(said)
    ]
    messages[0]["content"] = [{"type": "text", "text": said[0]}, {"type": "image"}]
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        chat_template(name)
    )
    assert (
        template.render(messages=messages, add_generation_prompt=True)
        == conversation.get_prompt()
    )


def refused(capsys, *words):
    """The one line that the command answers, and nothing is left of its output."""
    output = words[words.index("--output") + 1]
    assert llm2clip(["llava", "export", *map(str, words)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}*"))
    return message


def test_another_conversation_is_refused(exported, tmp_path, capsys):
    out = tmp_path / "hf"
    assert "'v1'" in refused(
        capsys, exported[0], "--conv-mode", "chatml_direct", "--output", out
    )
    assert "'vicuna'; known: " in refused(
        capsys, exported[0], "--conv-mode", "vicuna", "--output", out
    )
    assert str(exported[1]) in refused(capsys, exported[1], "--output", out)


@pytest.mark.both_stacks
def test_a_base_whose_weights_were_replaced_is_refused(tmp_path, home, capsys):
    base = base_model(tmp_path / "vicuna")
    record = {BASE: model_record(str(base))}
    checkpoint = lora(tmp_path / "llava-lora", CLIP, base, **record)
    words = ["llava", "export", str(checkpoint), "--no-compare", "--output"]
    assert llm2clip([*words, str(tmp_path / "hf")]) == 0
    weights = language_weights()
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    message = refused(capsys, checkpoint, "--output", tmp_path / "hf-2")
    assert f"{checkpoint} is a LoRA that was trained on {base} with other" in message
    assert "--model-base" in message


def test_a_difference_is_refused(exported, tmp_path, home, monkeypatch, capsys):
    """A model that computes something else never gets its name."""
    checkpoint = shutil.copytree(exported[0], tmp_path / "llava-tiny")
    swapped = {
        f"mm_projector.{number}": f"multi_modal_projector.linear_{2 - number // 2}"
        for number in (0, 2)
    }
    monkeypatch.setattr("llava_integration.serve.build.PROJECTOR", swapped)
    assert "differs from LLaVA's own code" in refused(
        capsys, checkpoint, "--output", tmp_path / "hf"
    )
