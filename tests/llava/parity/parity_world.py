"""A tiny LLaVA whose every weight is drawn by numpy, so that it is the same whatever version of transformers opens it.

``tokenizer.model`` was trained once by sentencepiece as Llama's is (identity normalization, spaces kept).
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import llava_world
import numpy as np
import torch
from safetensors.torch import save_file

from llm2clip_plugin.vision.export import export_tower

VOCABULARY = Path(__file__).with_name("tokenizer.model")
PIECES, WIDTH, HIDDEN, LAYERS, HEADS = 400, 32, 64, 2, 4
COMMON = {
    "vocab_size": PIECES,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
SEES = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "use_mm_proj": True,
    "tokenizer_padding_side": "left",
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llava-llama": {"model_type": "llava_llama", "image_aspect_ratio": "pad"},
    "llava-mistral-anyres": {
        "model_type": "llava_mistral",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        "mm_patch_merge_type": "spatial_unpad",
        "sliding_window": None,
    },
    "llava-s2": {"model_type": "llava_llama", "image_aspect_ratio": "pad", "s2": True, "s2_scales": "28,56"},
}
CLASSES = {"llava_llama": "LlavaLlamaForCausalLM", "llava_mistral": "LlavaMistralForCausalLM"}


def draw(name: str, *shape: int, scale: float = 0.25) -> torch.Tensor:
    """A tensor that depends on its name and shape alone."""
    numbers = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy((numbers.standard_normal(shape) * scale).astype("float32"))


def language_model() -> dict[str, torch.Tensor]:
    """The weights of a Llama or a Mistral."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (PIECES, WIDTH),
        "lm_head.weight": (PIECES, WIDTH),
    }
    for layer in range(LAYERS):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{layer}.self_attn.{name}.weight"] = (WIDTH, WIDTH)
        for name in ("gate_proj", "up_proj"):
            shapes[f"model.layers.{layer}.mlp.{name}.weight"] = (HIDDEN, WIDTH)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (WIDTH, HIDDEN)
    norms = ["model.norm.weight"]
    norms += [f"model.layers.{n}.{name}.weight" for n in range(LAYERS) for name in NORMS]
    return {
        **{name: draw(name, *shape) for name, shape in shapes.items()},
        **{name: torch.ones(WIDTH) for name in norms},
    }


NORMS = ("input_layernorm", "post_attention_layernorm")


def projector(scales: int = 1) -> dict[str, torch.Tensor]:
    """The weights of LLaVA's projector, from features of ``scales`` towers' width."""
    shapes = {"0.weight": (WIDTH, WIDTH * scales), "0.bias": (WIDTH,), "2.weight": (WIDTH, WIDTH), "2.bias": (WIDTH,)}
    return {f"model.mm_projector.{name}": draw(f"projector {name}", *shape) for name, shape in shapes.items()}


def places(root: Path) -> llava_world.World:
    """Where everything lies."""
    return llava_world.World(
        root=root,
        llm=root / "tiny-vicuna",
        images=root / "images",
        pretrain_data=root / "pretrain.json",
        finetune_data=root / "finetune.json",
        questions=root / "questions.jsonl",
        towers={"clip": root / "towers" / "clip"},
    )


def make_parity_world(root: Path) -> llava_world.World:
    """Pictures, conversations, a tower, a language model, a projector, and a LLaVA of each of CHECKPOINTS."""
    world = places(root)
    towers = world.towers
    root.mkdir(parents=True, exist_ok=True)
    llava_world.make_data(world, llava_world.make_images(world.images))
    tower = llava_world.make_tower("clip")
    with torch.no_grad():
        for name, parameter in tower.named_parameters():  # transformers 5 has no vision_model. in the names
            parameter.copy_(draw(name.removeprefix("vision_model."), *parameter.shape, scale=0.2))
    export_tower(tower, towers["clip"], origin="made for tests")
    save(world.llm, {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **COMMON}, language_model())
    torch.save(projector(), root / "mm_projector.bin")
    for name, settings in CHECKPOINTS.items():
        scales = 2 if settings.get("s2") else 1
        config = {**COMMON, **SEES, "mm_hidden_size": WIDTH * scales, "mm_vision_tower": f"llm2clip:{towers['clip']}"}
        tensors = {**language_model(), **projector(scales)}
        if settings.get("mm_patch_merge_type") == "spatial_unpad":
            tensors["model.image_newline"] = draw("newline", WIDTH)
        save(root / name, {**config, **settings, "architectures": [CLASSES[settings["model_type"]]]}, tensors)
    return world


def save(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """A checkpoint with its tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    save_tokenizer(folder, legacy=True)


def save_tokenizer(folder: Path, *, legacy: bool) -> None:
    """Llama's tokenizer, as Vicuna's repository has it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(VOCABULARY, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({**llava_world.TOKENIZER, "legacy": legacy}))
