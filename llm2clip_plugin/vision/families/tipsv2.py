"""TIPSv2 (transformers 5.24): DINOv2's architecture with a second class token in place of
registers, which states leave out; pixels in [0, 1]."""

from llm2clip_plugin.vision.families import BASE, LARGE, Family, TowerCode, wrapped

SIZE = {"image_size": 448, "patch_size": 14}

FAMILY = Family(
    name="tipsv2",
    # and in an exported LLaVA
    model_types=("tipsv2_vision_model", "tipsv2", "llm2clip_tipsv2"),
    vision_class=wrapped(
        "Tipsv2Tower", of="Tipsv2VisionModel", title="TIPSv2", since="5.24"
    ),
    has_cls=True,
    positions="embeddings.position_embeddings",
    blocks="encoder.layer",
    final_norm="layernorm",
    never_trained=("embeddings.mask_token",),
    not_tower=("text_encoder.", "temperature"),
    mean=(0.0, 0.0, 0.0),  # pixels are not normalized
    std=(1.0, 1.0, 1.0),
    resample=2,
    scale=100.0,  # its own, about 197, is clamped to this
    needs="transformers>=5.24",
    code=TowerCode(
        file="wrapped",
        config="Tipsv2TowerConfig",
        model="Tipsv2Tower",
        is_in_transformers=True,
    ),
    # other sizes are those of DINOv2
    shapes={
        "google/tipsv2-b14": {**BASE, **SIZE},
        "google/tipsv2-l14": {**LARGE, **SIZE},
    },
)
