"""Qwen2.5-VL's tower, implemented in this package: no class token, attention in windows, squares of
a multiple of 28 pixels."""

from llm2clip_plugin.vision.families import Family, TowerCode, in_module

FAMILY = Family(
    name="qwen25",
    model_types=("llm2clip_qwen25",),
    vision_class=in_module("llm2clip_plugin.vision.qwen25", "Qwen25VisionModel"),
    has_cls=False,
    positions="",
    blocks="blocks",
    embeddings=("patch_embed",),
    final_norm="",
    last_state_is_normed=True,  # as far as it ever is
    code=TowerCode(
        file="qwen25", config="Qwen25VisionConfig", model="Qwen25VisionModel"
    ),
    # the tower of both is the configuration's default, but for the weights
    shapes={
        "Qwen/Qwen2.5-VL-3B-Instruct": {"image_size": 448},
        "Qwen/Qwen2.5-VL-7B-Instruct": {"image_size": 448},
    },
)
