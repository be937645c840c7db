"""MLCD (transformers 5): a class token, and rotary positions, which fit any grid."""

import importlib
from typing import Any

from llm2clip_plugin.vision.families import Family


def vision_class() -> Any:
    """The class of transformers; ValueError in versions that have none."""
    transformers = importlib.import_module("transformers")
    if not hasattr(transformers, "MLCDVisionModel"):
        raise ValueError(
            f"MLCD requires transformers 5 or newer; {transformers.__version__} is installed"
        )
    return transformers.MLCDVisionModel


FAMILY = Family(
    name="mlcd",
    model_types=("mlcd_vision_model", "mlcd"),
    vision_class=vision_class,
    has_cls=True,
    positions="",
    embeddings=("embeddings", "pre_layrnorm", "class_pos_emb"),
    final_norm="post_layernorm",
    last_state_is_normed=False,  # the class token alone is, as pooled output
    needs="transformers>=5",
)
