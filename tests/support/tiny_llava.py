"""What a tiny LLaVA world holds: a Llama of two layers with its tokenizer, towers, pictures,
conversations."""

import json
import random
from pathlib import Path

import numpy as np
import torch
import transformers
from llava_world import WIDTH, World, places
from PIL import Image

from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel
from llm2clip_plugin.vision.export import export_tower

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 60, 230),
    "white": (250, 250, 250),
}


# 2 x 2 patches
SHAPES = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


PIECES = 600  # of the tokenizer


# As in Vicuna's repository; written by hand, because each version of transformers saves another set
# of files
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
}


TOKENIZER |= {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": None,
}


TOKENIZER |= {"clean_up_tokenization_spaces": False, "sp_model_kwargs": {}}


def make_world(root: Path, heads: int = 4) -> World:
    """Everything, in a few seconds. ``heads``: of the language model, whose heads are 32 / heads
    wide."""
    world = places(root, ("clip", "other", "wide", "siglip", "dinov2", "eva02"))
    make_data(world, make_images(world.images))
    make_llm(world, heads)
    for seed, (name, directory) in enumerate(world.towers.items()):
        torch.manual_seed(seed)
        export_tower(make_tower(name), directory, origin=f"made for tests: {name}")
    return world


def make_images(folder: Path) -> list[str]:
    """Twelve pictures of four colours, of different shapes and sizes."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    names = []
    for number in range(12):
        colour = list(COLOURS)[number % len(COLOURS)]
        height, width = noise.integers(20, 60, 2)
        pixels = np.array(COLOURS[colour]) + noise.integers(-20, 20, (height, width, 3))
        names.append(f"{colour}-{number}.png")
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / names[-1])
    return names


def make_data(world: World, names: list[str]) -> None:
    """Captions for pretrain, conversations for finetune (one in four without a picture),
    questions."""
    pretrain = []
    finetune = []
    questions = []
    for number, name in enumerate(names):
        colour = name.partition("-")[0]
        asked = {"from": "human", "value": "<image>\nWhat is it?"}
        answered = {"from": "gpt", "value": f"a {colour} picture"}
        pretrain.append(
            {"id": str(number), "image": name, "conversations": [asked, answered]}
        )
        question = (
            "Which colour is the picture?"
            if number % 2
            else "Tell me the colour of it, in one short word."
        )
        talk = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": colour},
        ]
        finetune.append({"id": str(number), "image": name, "conversations": talk})
        if number % 4 == 0:
            talk = [
                {"from": "human", "value": "Say a colour."},
                {"from": "gpt", "value": colour},
            ]
            finetune.append({"id": f"text-{number}", "conversations": talk})
        questions.append(
            {
                "question_id": number,
                "image": name,
                "text": question,
                "category": "colour",
            }
        )
    world.pretrain_data.write_text(json.dumps(pretrain))
    world.finetune_data.write_text(json.dumps(finetune))
    world.questions.write_text(
        "".join(json.dumps(question) + "\n" for question in questions)
    )


def make_llm(world: World, heads: int) -> None:
    """A Llama of two layers and a sentencepiece tokenizer of 400 pieces; legacy, as LLaVA's masking
    expects."""
    import sentencepiece

    draw = random.Random(0)
    # words that no change of the tests changes
    license_text = (Path(__file__).parents[2] / "LICENSE").read_text()
    words = (
        world.pretrain_data.read_text() + world.finetune_data.read_text() + license_text
    ).split()
    text = world.root / "text.txt"
    text.write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(2000)))
    options = {
        "vocab_size": PIECES,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 1.0,
    }
    options |= {"model_prefix": str(world.root / "pieces"), "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(text), **options)
    world.llm.mkdir()
    (world.root / "pieces.model").rename(world.llm / "tokenizer.model")
    (world.llm / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    torch.manual_seed(0)
    sizes = {
        "vocab_size": PIECES,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "pad_token_id": 0,
    }
    sizes |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
    }
    config = transformers.LlamaConfig(**sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(
        world.llm, safe_serialization=True
    )


def make_tower(name: str) -> torch.nn.Module:
    """A random vision model; "other" is a CLIP of the same shape, "wide" a wider one; SigLIP has no
    class token."""
    common = {"hidden_size": 48 if name == "wide" else WIDTH, **SHAPES}
    if name == "dinov2":
        return transformers.Dinov2Model(
            transformers.Dinov2Config(mlp_ratio=2, **common)
        ).eval()
    common["intermediate_size"] = 64
    if name == "siglip":
        return transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**common)
        ).eval()
    if name == "eva02":
        return Eva02VisionModel(Eva02Config(**common)).eval()
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(hidden_act="quick_gelu", **common)
    ).eval()
