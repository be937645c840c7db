"""MetaCLIP 2: CLIP's architecture with another text tower, so its image tower runs wherever CLIP's does."""

import functools
from typing import Any

from llm2clip_plugin.vision.families import Family


@functools.lru_cache(maxsize=1)
def _vision_class() -> Any:
    import transformers

    if hasattr(transformers, "MetaClip2VisionModel"):
        return transformers.MetaClip2VisionModel

    class MetaClip2VisionConfig(transformers.CLIPVisionConfig):
        """CLIP's, under the Hub's type."""

        model_type = "metaclip_2_vision_model"

        @classmethod
        def from_pretrained(cls, directory, **kwargs):
            """The vision model's own configuration, or its part of an image-text model's."""
            fields, rest = cls.get_config_dict(directory, **kwargs)
            return cls.from_dict(fields.get("vision_config", fields), **rest)

    class MetaClip2VisionModel(transformers.CLIPVisionModel):
        """CLIP's tower in versions of transformers without MetaCLIP 2, such as LLaVA's."""

        config_class = MetaClip2VisionConfig

    return MetaClip2VisionModel


def _image_text_class() -> Any:
    import transformers

    return getattr(transformers, "MetaClip2Model", transformers.CLIPModel)


H = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}
G = {"hidden_size": 1664, "num_hidden_layers": 48, "num_attention_heads": 16, "intermediate_size": 8192}

FAMILY = Family(
    name="metaclip2",
    model_types=("metaclip_2_vision_model", "metaclip_2"),
    vision_class=_vision_class,
    has_cls=True,
    embeddings=("embeddings", "pre_layrnorm"),  # sic, on the Hub
    final_norm="post_layernorm",
    last_state_is_normed=False,  # only the pooled class token is
    file_prefix="vision_model.",
    not_tower=("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
    image_text_class=_image_text_class,
    image_text_tensors=("visual_projection.weight",),
    shapes={
        "facebook/metaclip-2-worldwide-huge-quickgelu": {**H, "image_size": 224, "patch_size": 14},
        "facebook/metaclip-2-worldwide-huge-378": {**H, "image_size": 378, "patch_size": 14, "hidden_act": "gelu"},
        "facebook/metaclip-2-worldwide-giant-378": {**G, "image_size": 378, "patch_size": 14, "hidden_act": "gelu"},
    },
)
