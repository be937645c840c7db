"""Shapes of known towers: what a run is planned with where no weights are and nothing can be downloaded.

Sources: the published config.json files of OpenAI's CLIP, SigLIP, SigLIP 2 and DINOv2, and EVA-CLIP's model
configurations (arXiv 2303.15389, table 8; arXiv 2303.11331, table 2 for the widths of SwiGLU).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.vision.family import Tower
from llm2clip_plugin.vision.towers import (
    TIMM_PREFIX,
    check_size,
    family_named,
    family_of_type,
    load_config,
    read_json,
    resize_tower,
)

B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
CLIP_B = {**B, "intermediate_size": 3072, "hidden_act": "quick_gelu", "image_size": 224}
CLIP_L = {**L, "intermediate_size": 4096, "hidden_act": "quick_gelu", "patch_size": 14}
EVA_L = {**L, "intermediate_size": 2730, "patch_size": 14, "rope_pretrained_grid": 16}  # int(1024 * 2.6667)
PLAIN_EVA = {"hidden_act": "gelu", "sub_norm": False, "rope": False}
BIG_E = {"hidden_size": 1792, "num_hidden_layers": 64, "num_attention_heads": 16, "intermediate_size": 15360}
EVA_G = {"hidden_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 16, "intermediate_size": 6144}
DINO_B = {**B, "image_size": 518, "patch_size": 14}  # positions of 37 x 37 patches

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {  # name or Hub id -> family, fields of its config.json
    "openai/clip-vit-base-patch32": ("clip", {**CLIP_B, "patch_size": 32}),
    "openai/clip-vit-base-patch16": ("clip", {**CLIP_B, "patch_size": 16}),
    "openai/clip-vit-large-patch14": ("clip", {**CLIP_L, "image_size": 224}),
    "openai/clip-vit-large-patch14-336": ("clip", {**CLIP_L, "image_size": 336}),
    "eva02-b16": (
        "eva02",
        {**B, "intermediate_size": 2048, "image_size": 224, "patch_size": 16, "rope_pretrained_grid": 16},
    ),
    "eva02-l14-224": ("eva02", {**EVA_L, "image_size": 224}),
    "eva02-l14-336": ("eva02", {**EVA_L, "image_size": 336}),
    "eva02-bige14": ("eva02", {**BIG_E, **PLAIN_EVA, "post_norm": True, "image_size": 224, "patch_size": 14}),
    "eva01-g14": ("eva02", {**EVA_G, **PLAIN_EVA, "image_size": 224, "patch_size": 14}),
    "google/siglip-base-patch16-224": (
        "siglip",
        {**B, "intermediate_size": 3072, "image_size": 224, "patch_size": 16},
    ),
    "google/siglip-so400m-patch14-384": ("siglip", {**SO400M, "image_size": 384, "patch_size": 14}),
    "google/siglip2-base-patch16-224": (
        "siglip",
        {**B, "intermediate_size": 3072, "image_size": 224, "patch_size": 16},
    ),
    "google/siglip2-so400m-patch14-224": ("siglip", {**SO400M, "image_size": 224, "patch_size": 14}),
    "google/siglip2-so400m-patch14-384": ("siglip", {**SO400M, "image_size": 384, "patch_size": 14}),
    "facebook/dinov2-small": ("dinov2", {**DINO_B, "hidden_size": 384, "num_attention_heads": 6}),
    "facebook/dinov2-base": ("dinov2", DINO_B),
    "facebook/dinov2-large": ("dinov2", {**L, "image_size": 518, "patch_size": 14}),
    "facebook/dinov2-giant": (
        "dinov2",
        {**DINO_B, "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True},
    ),
}


def meta_tower(source: str, *, image_size: int | None = None) -> Tower:
    """A tower's modules on the meta device: every shape, no weights, nothing downloaded.

    ``source``: a tower directory (its config.json), a name of the table, or ``timm:NAME``. Raises ValueError for
    anything else, FileNotFoundError for a directory without config.json.
    """
    if source.startswith(TIMM_PREFIX):
        return _timm_meta_tower(source.removeprefix(TIMM_PREFIX), image_size)
    if Path(source).expanduser().is_dir():
        directory = Path(source).expanduser()
        model_type = str(read_json(directory / "config.json").get("model_type"))
        family = family_of_type(model_type, where=str(directory / "config.json"))
        config = load_config(directory, family)
    elif source in ARCHITECTURES:
        name, fields = ARCHITECTURES[source]
        family = family_named(name)
        config = family.vision_class().config_class(**fields)
    else:
        raise ValueError(
            f"no tower directory {source!r}, and no shape is known by that name; "
            f"known: {', '.join(ARCHITECTURES)}, timm:NAME"
        )
    if image_size:
        check_size(config, image_size)
        config.image_size = image_size
    with torch.device("meta"):
        return family.vision_class()(config)


def _timm_meta_tower(name: str, image_size: int | None) -> Tower:
    """timm's rates of stochastic depth are read from tensors while a model is built, so it is built with memory."""
    from llm2clip_plugin.vision.timm_tower import timm_tower

    tower = timm_tower(name, pretrained=False)
    if image_size and image_size != tower.config.image_size:
        tower = resize_tower(tower, image_size)
    return tower.to("meta")
