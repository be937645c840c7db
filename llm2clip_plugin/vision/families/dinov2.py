"""DINOv2: class token, layer scale, positions for the grid of pretraining (37 x 37 in the released
models)."""

from llm2clip_plugin.vision.families import (
    BASE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LARGE,
    Family,
    in_transformers,
)

SIZE = {"image_size": 518, "patch_size": 14}
SMALL = {**BASE, "hidden_size": 384, "num_attention_heads": 6}
GIANT = {
    "hidden_size": 1536,
    "num_hidden_layers": 40,
    "num_attention_heads": 24,
    "use_swiglu_ffn": True,
}

FAMILY = Family(
    name="dinov2",
    model_types=("dinov2",),
    vision_class=in_transformers("Dinov2Model"),
    has_cls=True,
    positions="embeddings.position_embeddings",
    blocks="encoder.layer",
    final_norm="layernorm",
    never_trained=("embeddings.mask_token",),
    not_tower=("classifier.",),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    shapes={
        "facebook/dinov2-small": {**SMALL, **SIZE},
        "facebook/dinov2-base": {**BASE, **SIZE},
        "facebook/dinov2-large": {**LARGE, **SIZE},
        "facebook/dinov2-giant": {**GIANT, **SIZE},
    },
)
