"""SigLIP 2 NaFlex: images of any aspect in at most so many patches (transformers 4: squares); no
class token."""

from typing import Any

from llm2clip_plugin.vision.families import (
    BASE,
    HALF_MEAN,
    HALF_STD,
    Family,
    in_module,
    in_transformers,
    wrapped,
)
from llm2clip_plugin.vision.families.siglip import SO400M


def _vision_class() -> Any:
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        return in_module("llm2clip_plugin.vision.naflex", "SquareNaflexTower")()
    return _native()


_native = wrapped(
    "NaflexTower",
    of="Siglip2VisionModel",
    title="NaFlex",
    since="5",
    config="NaflexTowerConfig",
    file="naflex",
)
FAMILY = Family(
    name="naflex",
    model_types=("siglip2_vision_model", "siglip2"),
    vision_class=_vision_class,
    has_cls=False,
    positions="",  # interpolated for each image in the forward pass
    final_norm="post_layernorm",
    pooling_head=("head",),
    file_prefix="vision_model.",
    not_tower=(
        "text_model.",
        "text_adapter.",
        "visual_projection.",
        "logit_scale",
        "logit_bias",
    ),
    image_text_class=in_transformers("Siglip2Model"),
    image_text_tensors=("logit_bias",),
    mean=HALF_MEAN,
    std=HALF_STD,
    resample=2,
    opens_as="siglip_vision_model",  # of square images
    shapes={
        "google/siglip2-base-patch16-naflex": {**BASE, "intermediate_size": 3072},
        "google/siglip2-so400m-patch16-naflex": SO400M,
    },
)
