"""DINOv2 with registers (transformers 4.48): as DINOv2; states leave out the register tokens."""

from llm2clip_plugin.vision.families import (
    BASE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LARGE,
    Family,
    TowerCode,
    wrapped,
)
from llm2clip_plugin.vision.families.dinov2 import GIANT, SIZE, SMALL

FAMILY = Family(
    name="dinov2_registers",
    # and in an exported LLaVA
    model_types=("dinov2_with_registers", "llm2clip_dinov2_registers"),
    vision_class=wrapped(
        "Dinov2RegistersTower",
        of="Dinov2WithRegistersModel",
        title="DINOv2 with registers",
        since="4.48",
    ),
    has_cls=True,
    positions="embeddings.position_embeddings",
    blocks="encoder.layer",
    final_norm="layernorm",
    never_trained=("embeddings.mask_token",),
    not_tower=("classifier.",),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    needs="transformers>=4.48",
    code=TowerCode(
        file="wrapped",
        config="Dinov2RegistersConfig",
        model="Dinov2RegistersTower",
        is_in_transformers=True,
    ),
    shapes={
        "facebook/dinov2-with-registers-small": {**SMALL, **SIZE},
        "facebook/dinov2-with-registers-base": {**BASE, **SIZE},
        "facebook/dinov2-with-registers-large": {**LARGE, **SIZE},
        "facebook/dinov2-with-registers-giant": {**GIANT, **SIZE},
    },
)
