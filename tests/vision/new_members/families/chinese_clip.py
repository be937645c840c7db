"""Chinese-CLIP (transformers): OpenAI's CLIP with a Chinese text tower."""

from llm2clip_plugin.vision.families import BASE, Family, in_transformers

FAMILY = Family(
    name="chinese_clip",
    model_types=("chinese_clip_vision_model", "chinese_clip"),
    vision_class=in_transformers("ChineseCLIPVisionModel"),
    has_cls=True,
    positions="embeddings.position_embedding.weight",
    blocks="encoder.layers",
    embeddings=("embeddings", "pre_layrnorm"),
    final_norm="post_layernorm",
    last_state_is_normed=False,
    file_prefix="vision_model.",
    not_tower=("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
    image_text_class=in_transformers("ChineseCLIPModel"),
    image_text_tensors=("visual_projection.weight",),
    shapes={"OFA-Sys/chinese-clip-vit-base-patch16": {**BASE, "image_size": 224, "patch_size": 16}},
)
