"""A vision-language model of any tower and any LLM: equal to its parts, trained by transformers'
Trainer, reloaded."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from serve_checkpoints import tower_directory
from tiny_llm import save_tiny_llm, tiny_tokenizer
from tiny_vlm import LLMS, TOWERS, build, place
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from llava_integration.plug.tower import LLM2CLIPVisionTower
from llava_integration.plug.towers import TowerLocation
from llava_integration.serve.build import register
from llava_integration.serve.export import test_image as picture
from llava_integration.serve.rows import LlavaRows
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.towers import load_tower

BOS = 1


ASKED = [
    {"type": "image", "image": picture()},
    {"type": "text", "text": "Which color?"},
]


def by_hand(folder: Path, tower: str, llm: Path, inputs: Any) -> torch.Tensor:
    """Logits of tower, projector and LLM as their own libraries load them."""
    vision = load_tower(place(tower))
    language_model = AutoModelForCausalLM.from_pretrained(llm).eval()
    state = vision(
        pixel_values=inputs["pixel_values"], output_hidden_states=True
    ).hidden_states[-2]
    state = state[:, 1:] if family_of(vision).has_cls else state
    weights = load_file(folder / "model.safetensors")
    for n in (1, 2):
        layer = [
            weights[f"multi_modal_projector.linear_{n}.{kind}"]
            for kind in ("weight", "bias")
        ]
        state = torch.nn.functional.linear(
            torch.nn.functional.gelu(state) if n == 2 else state, *layer
        )
    ids = inputs["input_ids"][0]
    slot = json.loads((folder / "config.json").read_text())["image_token_index"]
    start = int((ids == slot).nonzero()[0])
    stop = int((ids == slot).nonzero()[-1]) + 1
    assert stop - start == state.shape[1] == int((ids == slot).sum())
    embed = language_model.get_input_embeddings()
    return language_model(
        inputs_embeds=torch.cat((embed(ids[:start]), state[0], embed(ids[stop:])))[None]
    ).logits


def loss_of(model: Any, batch: dict[str, Any]) -> float:
    with torch.inference_mode():
        return model.eval()(**batch).loss.item()


@pytest.mark.parametrize(
    ("tower", "llm"),
    [*itertools.product(TOWERS, LLMS), ("naflex", "qwen3"), ("qwen3_vit", "qwen3")],
)
def test_equals_its_parts_and_trains(
    llms: Path, tmp_path: Path, tower: str, llm: str
) -> None:
    """One step of the projector alone, in which the frozen tower stays in eval mode, then one of
    everything."""
    folder = build(tower, llms / llm, tmp_path / "vlm")
    register()
    processor = AutoProcessor.from_pretrained(folder)
    chats = [
        [{"role": "user", "content": ASKED}, {"role": "assistant", "content": answer}]
        for answer in ("red", "no")
    ]
    options = {
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
        "processor_kwargs": {"padding": True},
    }
    batch = dict(processor.apply_chat_template(chats, **options))
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder)
    with torch.inference_mode():
        first_chat = {name: value[:1] for name, value in batch.items()}
        assert first_chat["attention_mask"].all()
        logits = model(**first_chat).logits
        expected = by_hand(folder, tower, llms / llm, first_chat)
    assert (
        logits[..., : expected.shape[-1]] - expected
    ).abs().max() <= 1e-5 * expected.abs().max()

    batch["labels"] = batch["input_ids"].masked_fill(
        batch["input_ids"] == model.config.image_token_index, -100
    )
    rows: list[dict[str, Any]] = []
    for number in range(2):
        rows.append({name: value[number] for name, value in batch.items()})
    settings = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=1,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        use_cpu=True,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = [loss_of(model, batch)]
    for trains in (("multi_modal_projector",), ("",)):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in trains))
        Trainer(model, settings, train_dataset=rows).train()
        losses.append(loss_of(model, batch))
        changed = {
            name.split(".")[1]
            for name, value in model.state_dict().items()
            if not value.equal(before[name])
        }
        assert "multi_modal_projector" in changed
        assert ("vision_tower" in changed) == (trains == ("",))
    assert losses[0] > losses[1] > losses[2]

    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "trained")
    assert loss_of(again, batch) == pytest.approx(losses[2], rel=1e-6)


def test_a_frozen_tower_is_not_random(llms: Path, tmp_path: Path) -> None:
    """DINOv3 draws a scale of its positions in training mode; frozen, it computes the same
    twice."""
    folder = build("dinov3", llms / "llama", tmp_path / "vlm", "--no-compare")
    register()
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder).train()
    pixels = torch.rand(1, 3, *[model.config.vision_config.image_size] * 2)

    def features() -> torch.Tensor:
        return model.get_image_features(pixel_values=pixels).pooler_output[0]

    assert model.model.vision_tower.training
    assert not torch.equal(features(), features())
    model.model.vision_tower.requires_grad_(False)
    model.train()
    assert model.training
    assert not model.model.vision_tower.training
    assert torch.equal(features(), features())


@pytest.mark.parametrize("layer", [0, -2, -3])
@pytest.mark.parametrize("name", TOWERS)
def test_the_tower_in_llavas_own_model(name: str, layer: int) -> None:
    """As above; every hidden state can be selected, the input of the first block too."""
    location = TowerLocation.of(tower_directory(name), how="here")
    tower = LLM2CLIPVisionTower(
        "here", location, SimpleNamespace(mm_vision_select_layer=layer)
    )
    assert torch.nn.ModuleList([tower]).train().training
    assert not any(module.training for module in tower.modules())
    size = location.card.image_size
    pixels = torch.rand(1, 3, size, size)
    expected = load_tower(location.directory)(
        pixel_values=pixels, output_hidden_states=True
    ).hidden_states[layer]
    assert torch.equal(
        tower(pixels), expected[:, 1:] if location.card.has_cls else expected
    )
    assert tower.image_size == size  # of which LLaVA-NeXT makes grids
    assert tower.requires_grad_(True).train().vision_tower.training


@pytest.mark.parametrize("llm", ["llama", "qwen2", "mistral", "phi3"])
def test_other_llms(
    llms: Path, tmp_path: Path, llm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command compares the folder with its parts."""
    build("clip", llms / llm, tmp_path / "vlm")
    said = capsys.readouterr().out
    assert float(said.split("logits within ")[1].split()[0]) <= 1e-5


@pytest.mark.parametrize("arch", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("tower", ["siglip", "dinov3"])
def test_tiles(llms: Path, tmp_path: Path, tower: str, arch: str) -> None:
    """The command compares the folder with its parts; an image has more tokens than one tile's."""
    folder = build(tower, llms / "qwen3", tmp_path / "vlm", "--arch", arch)
    config = json.loads((folder / "config.json").read_text())
    processor = AutoProcessor.from_pretrained(folder)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batches = [
        processor.apply_chat_template([{"role": "user", "content": ASKED}], **options)
    ]
    assert (batches[0]["input_ids"] == config["image_token_index"]).sum() > 2 * config[
        "image_seq_length"
    ]
    said = [
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "a"},
        {"from": "human", "value": "b"},
    ]
    picture().save(tmp_path / "wide.png")
    trained = LlavaRows(processor, tmp_path)(
        [{"image": "wide.png", "conversations": said}]
    )["labels"][0]
    assert processor.decode(trained[trained >= 0]).endswith("a<end>")
    if arch == "llava_onevision":
        size = config["vision_config"]["image_size"]
        frames = torch.randint(255, (3, 3, 40, 50), dtype=torch.uint8)
        chat = [
            {
                "role": "user",
                "content": [
                    {"type": "video"},
                    {"type": "text", "text": "What happens?"},
                ],
            }
        ]
        batches += [
            processor(
                videos=[frames],
                text=processor.apply_chat_template(chat),
                return_tensors="pt",
            )
        ]
        assert batches[1]["pixel_values_videos"].shape == (1, 3, 3, size, size)
    register()
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert all(model(**batch).logits.isfinite().all() for batch in batches)


def test_code_of_the_tower_travels_with_tiles(llms: Path, tmp_path: Path) -> None:
    """trust_remote_code opens a tower where this package is not installed, with every weight of the
    file."""
    folders = [
        build("eva02", llms / "qwen3", tmp_path / arch, "--arch", arch)
        for arch in ("llava_next", "llava")
    ]
    program = """
import sys
sys.modules["llm2clip_plugin"] = sys.modules["llava_integration"] = None
import transformers
for folder in sys.argv[1:]:
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True)
    print(type(model).__name__, *info["missing_keys"], *info["unexpected_keys"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *folders],
        capture_output=True,
        text=True,
        check=False,
        # of the program alone: transformers keeps what it reads first for the whole process
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    names = [
        "LlavaNextTowerForConditionalGeneration",
        "LlavaTowerForConditionalGeneration",
    ]
    assert done.stdout.splitlines()[-2:] == names, done.stderr


def of_llama_3(tokenizer: Any) -> None:
    """Its <s> is added by a template in a sequence; the chat template writes another."""
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), backend.post_processor]
    )


def of_a_template_without_bos(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")


@pytest.mark.parametrize("change", [None, of_llama_3, of_a_template_without_bos])
def test_one_bos_whichever_way(llms: Path, tmp_path: Path, change: Any) -> None:
    """In transformers' two ways and in vLLM's, which adds no special tokens to what the template
    renders."""
    llm = save_tiny_llm(tmp_path / "llm", "llama")
    tokenizer = tiny_tokenizer()
    if change is not None:
        change(tokenizer)
    tokenizer.save_pretrained(llm)
    assert transformers.AutoTokenizer.from_pretrained(llm)("x")["input_ids"][0] == BOS
    processor = AutoProcessor.from_pretrained(
        build("clip", llm, tmp_path / "vlm", "--no-compare")
    )
    chat = [{"role": "user", "content": ASKED}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    whole = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ways = [
        processor(images=picture(), text=text)["input_ids"][0],
        whole["input_ids"][0],
    ]
    ways += [
        processor.tokenizer(text, **more)["input_ids"]
        for more in ({"add_special_tokens": False}, {})
    ]
    assert [ids.count(BOS) for ids in ways] == [1] * 4
    assert {ids[0] for ids in ways} == {BOS}
    assert ways[0] == ways[1]
    assert ways[2] == ways[3]


def test_the_template_is_the_llms_with_slots(built: Path, llms: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(llms / "qwen3")
    processor = AutoProcessor.from_pretrained(built)
    turns = [
        {"type": "image"},
        {"type": "text", "text": "One"},
        {"type": "image"},
        {"type": "text", "text": "two?"},
    ]
    chat = [
        {"role": "user", "content": turns},
        {"role": "assistant", "content": "Yes."},
    ]
    flat = [{"role": "user", "content": "<image>\nOne<image>\ntwo?"}, chat[1]]
    expected = tokenizer.apply_chat_template(flat, tokenize=False)
    assert (
        processor.apply_chat_template(chat)
        == processor.apply_chat_template(flat)
        == expected
    )
