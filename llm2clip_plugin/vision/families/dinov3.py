"""DINOv3 (transformers 5): rotary positions for any grid; states leave out register tokens."""

from llm2clip_plugin.vision.families import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Family,
    TowerCode,
    wrapped,
)

FAMILY = Family(
    name="dinov3",
    model_types=("dinov3_vit", "llm2clip_dinov3"),  # and in an exported LLaVA
    vision_class=wrapped("Dinov3Tower", of="DINOv3ViTModel", title="DINOv3", since="5"),
    has_cls=True,
    positions="",
    blocks="model.layer",
    final_norm="norm",
    never_trained=("embeddings.mask_token",),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    needs="transformers>=5",
    code=TowerCode(
        file="wrapped",
        config="Dinov3TowerConfig",
        model="Dinov3Tower",
        is_in_transformers=True,
    ),
)
