"""OpenAI CLIP and the OpenCLIP models that Hugging Face holds as CLIP: B/32, B/16, L/14, L/14-336 ..."""

from __future__ import annotations

from llm2clip_plugin.vision.family import Family


def _vision_class() -> type:
    from transformers import CLIPVisionModel

    return CLIPVisionModel


FAMILY = Family(
    name="clip",
    model_types=("clip_vision_model", "clip"),
    vision_class=_vision_class,
    has_cls=True,
    file_prefix="vision_model.",
    positions="embeddings.position_embedding.weight",
    blocks="encoder.layers",
    embeddings=("embeddings", "pre_layrnorm"),  # the misspelling is the hub's
    final_norm="post_layernorm",
    last_state_is_normed=False,  # only the pooled class token is
    beside_tower=("text_model.", "text_projection.", "visual_projection.", "text_adapter.", "logit_scale"),
)
