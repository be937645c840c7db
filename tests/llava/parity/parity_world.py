"""A tiny LLaVA whose every weight is drawn by numpy, so that it is the same whatever version of
transformers opens it.

``tokenizer.model`` was trained once by sentencepiece as Llama's is (identity normalization, spaces
kept).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import llava_world
import tiny_llava
import torch
from safetensors.torch import save_file
from serve_checkpoints import (
    LLM,
    SEES,
    WIDTH,
    draw,
    language_weights,
    projector_weights,
)

from llm2clip_plugin.vision.export import export_tower

VOCABULARY = Path(__file__).with_name("tokenizer.model")
PIECES = 400
COMMON = {
    **LLM,
    "vocab_size": PIECES,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llava-llama": {"model_type": "llava_llama", "image_aspect_ratio": "pad"},
    "llava-mistral-anyres": {
        "model_type": "llava_mistral",
        "image_aspect_ratio": "anyres",
        "sliding_window": None,
    }
    | {
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        "mm_patch_merge_type": "spatial_unpad",
    },
    "llava-s2": {
        "model_type": "llava_llama",
        "image_aspect_ratio": "pad",
        "s2": True,
        "s2_scales": "28,56",
    },
}
CLASSES = {
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
}


def make_parity_world(root: Path) -> llava_world.World:
    """Pictures, conversations, a tower, a language model, a projector, and a LLaVA of each of
    CHECKPOINTS."""
    world = llava_world.places(root, ("clip",))
    towers = world.towers
    root.mkdir(parents=True, exist_ok=True)
    tiny_llava.make_data(world, tiny_llava.make_images(world.images))
    tower = tiny_llava.make_tower("clip")
    with torch.no_grad():
        # transformers 5 has no vision_model. in the names
        for name, parameter in tower.named_parameters():
            parameter.copy_(
                draw(name.removeprefix("vision_model."), *parameter.shape, scale=0.2)
            )
    export_tower(tower, towers["clip"], origin="made for tests")
    language_model = language_weights(PIECES, 0.0, torch.float32)
    save(world.llm, COMMON, language_model)
    torch.save(projector_weights(WIDTH, torch.float32), root / "mm_projector.bin")
    for name, settings in CHECKPOINTS.items():
        scales = 2 if settings.get("s2") else 1
        config = {
            **COMMON,
            **SEES,
            "mm_hidden_size": WIDTH * scales,
            "mm_vision_tower": f"llm2clip:{towers['clip']}",
        }
        config["tokenizer_padding_side"] = "left"
        tensors = {**language_model, **projector_weights(WIDTH * scales, torch.float32)}
        if settings.get("mm_patch_merge_type") == "spatial_unpad":
            tensors["model.image_newline"] = draw("newline", WIDTH)
        save(
            root / name,
            {**config, **settings, "architectures": [CLASSES[settings["model_type"]]]},
            tensors,
        )
    return world


def save(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """A checkpoint with its tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    save_tokenizer(folder, legacy=True)


def save_tokenizer(folder: Path, *, legacy: bool) -> None:
    """Llama's tokenizer, as Vicuna's repository has it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(VOCABULARY, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**tiny_llava.TOKENIZER, "legacy": legacy})
    )
