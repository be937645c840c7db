"""OpenAI CLIP, and the OpenCLIP models that are published as CLIP on the Hub: B/32, B/16, L/14, L/14-336 ..."""

from llm2clip_plugin.vision.families import BASE, LARGE, Family, in_transformers

B = {**BASE, "intermediate_size": 3072, "hidden_act": "quick_gelu", "image_size": 224}
L = {**LARGE, "intermediate_size": 4096, "hidden_act": "quick_gelu", "patch_size": 14}

FAMILY = Family(
    name="clip",
    model_types=("clip_vision_model", "clip"),
    vision_class=in_transformers("CLIPVisionModel"),
    has_cls=True,
    embeddings=("embeddings", "pre_layrnorm"),  # sic, on the Hub
    final_norm="post_layernorm",
    last_state_is_normed=False,  # only the pooled class token is
    file_prefix="vision_model.",
    not_tower=("text_model.", "text_projection.", "visual_projection.", "text_adapter.", "logit_scale"),
    image_text_class=in_transformers("CLIPModel"),
    image_text_tensors=("visual_projection.weight",),
    shapes={
        "openai/clip-vit-base-patch32": {**B, "patch_size": 32},
        "openai/clip-vit-base-patch16": {**B, "patch_size": 16},
        "openai/clip-vit-large-patch14": {**L, "image_size": 224},
        "openai/clip-vit-large-patch14-336": {**L, "image_size": 336},
    },
)
