"""Tiny LLaVA 1.5 checkpoints as LLaVA writes them, made in a second: full and LoRA, with any
tower."""

import functools
import json
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from llm2clip_plugin.installation import numbers

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden"
REFERENCE = GOLDEN / "reference"
SOURCES = {  # of towers, elsewhere than in golden/towers_of_today
    "clip": REFERENCE / "G_transformers_towers" / "clip_vision",
    "siglip": REFERENCE / "G_transformers_towers" / "siglip_vision",
    "dinov2": REFERENCE / "G_transformers_towers" / "dinov2",
    "eva02": REFERENCE / "A_vision_towers" / "eva02_l14" / "weights.safetensors",
}
# removed when the process ends
IMPORTED = tempfile.TemporaryDirectory(prefix="towers-")
IS_NEW = numbers(transformers.__version__) >= (5,)
# that run here
TODAY = (
    "metaclip2",
    "openvision",
    "qwen25",
    *(("aimv2", "dinov3", "radio", "pe_core") if IS_NEW else ()),
    *(("dinov2_registers", "tipsv2", "internvl") if IS_NEW else ()),
)
WIDTH = 32
MLP = 64
LAYERS = 2
TOKENS = 600
LLM = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
}
LLM |= {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": TOKENS,
}
LLM |= {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
LLM |= {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
    "pretraining_tp": 1,
}
LLM |= {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
# of LLaVA's settings, those that all checkpoints have
SEES = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
}
SEES |= {
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "use_mm_proj": True,
}
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
}
TOKENIZER |= {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<unk>",
    "unk_token": "<unk>",
}


def llava_config(tower: str, **changes: object) -> dict:
    """config.json of a LLaVA checkpoint."""
    of_data = {
        "image_aspect_ratio": "pad",
        "mm_patch_merge_type": "flat",
        "tokenizer_model_max_length": 256,
    }
    of_data |= {"mm_hidden_size": width_of(tower), "mm_vision_tower": tower}
    kind = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama"}
    return {**LLM, **SEES, **of_data, **kind, **changes}


def draw(name: str, *shape: int, scale: float = 0.25) -> torch.Tensor:
    """A tensor that depends on its name and shape alone, whatever the versions of libraries."""
    numbers = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy((numbers.standard_normal(shape) * scale).astype("float32"))


def language_weights(
    tokens: int = TOKENS, norms: float = 0.2, dtype: torch.dtype = torch.bfloat16
) -> dict:
    """The weights of a Llama or a Mistral; ``norms``: how far those of its norms are from 1."""
    shapes = {
        "model.embed_tokens.weight": (tokens, WIDTH),
        "lm_head.weight": (tokens, WIDTH),
    }
    for layer in range(LAYERS):
        for part in "qkvo":
            shapes[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = (
                WIDTH,
                WIDTH,
            )
        shapes |= {
            f"model.layers.{layer}.mlp.{part}_proj.weight": (MLP, WIDTH)
            for part in ("gate", "up")
        }
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (WIDTH, MLP)
    weights = {name: draw(name, *shape) for name, shape in shapes.items()}
    names = [
        f"model.layers.{n}.{kind}_layernorm.weight"
        for n in range(LAYERS)
        for kind in ("input", "post_attention")
    ]
    weights |= {
        name: 1 + draw(name, WIDTH, scale=norms)
        for name in (*names, "model.norm.weight")
    }
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


@functools.cache
def tower_directory(name: str) -> Path:
    """A golden tower, imported once in this process."""
    from llm2clip_plugin.vision.convert.importing import import_tower

    source = SOURCES.get(name, GOLDEN / "towers_of_today" / name)
    folder = Path(IMPORTED.name) / name
    import_tower(
        source,
        folder,
        config=source.with_name("config.json") if source.is_file() else None,
    )
    return folder


def width_of(tower: Path | str) -> int:
    """Width of a tower's patches."""
    return json.loads((Path(tower) / "config.json").read_text())["hidden_size"]


def projector_weights(
    width: int = 32, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """LLaVA's projector of a tower's width."""
    shapes = {
        "0.weight": (WIDTH, width),
        "0.bias": (WIDTH,),
        "2.weight": (WIDTH, WIDTH),
        "2.bias": (WIDTH,),
    }
    return {
        f"model.mm_projector.{name}": draw(f"projector {name}", *shape).to(dtype)
        for name, shape in shapes.items()
    }


def write_tokenizer_files(folder: Path, *, legacy: bool) -> None:
    """As LLaVA saves its tokenizer."""
    shutil.copy(Path(__file__).with_name("tokenizer.model"), folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**TOKENIZER, "legacy": legacy})
    )


def write_config(folder: Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def full(
    folder: Path, tower: Path | str, *, legacy: bool = True, **changes: object
) -> Path:
    """A full checkpoint."""
    folder.mkdir(parents=True)
    write_config(folder, llava_config(str(tower), **changes))
    save_file(
        language_weights() | projector_weights(width_of(tower)),
        folder / "model.safetensors",
        {"format": "pt"},
    )
    write_tokenizer_files(folder, legacy=legacy)
    return folder


def base_model(folder: Path) -> Path:
    """The language model that a LoRA starts from."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        write_config(folder, LLM)
        save_file(language_weights(), folder / "model.safetensors", {"format": "pt"})
        write_tokenizer_files(folder, legacy=True)
    return folder


def lora(folder: Path, tower: Path | str, base: Path, **changes: object) -> Path:
    """What LLaVA's training with --lora_enable True writes."""
    folder.mkdir(parents=True)
    write_config(
        folder, {**llava_config(str(tower), **changes), "_name_or_path": str(base)}
    )
    torch.save(
        {
            f"base_model.model.{name}": tensor
            for name, tensor in projector_weights(width_of(tower)).items()
        },
        folder / "non_lora_trainables.bin",
    )
    modules = ["q_proj", "v_proj", "up_proj"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
    }
    config |= {
        "bias": "none",
        "target_modules": modules,
        "base_model_name_or_path": str(base),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    halves = {}
    for name, weight in language_weights().items():
        if name.split(".")[-2] in modules:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            halves[f"{stem}.lora_A.weight"] = draw(
                f"{stem} A", 4, weight.shape[1]
            ).bfloat16()
            halves[f"{stem}.lora_B.weight"] = draw(
                f"{stem} B", weight.shape[0], 4
            ).bfloat16()
    save_file(halves, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
