"""OpenVision: CLIP's architecture without the norm before the blocks; the mean of the patches, normed, is pooled.

No library has its class; this one is transformers' CLIP, so it runs in LLaVA's pinned environment too.
"""

import functools
from typing import Any

from llm2clip_plugin.vision.family import BASE, IMAGENET_MEAN, IMAGENET_STD, LARGE, Family


@functools.lru_cache(maxsize=1)
def _vision_class() -> Any:
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        is_wrapped = hasattr(CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=1)), "vision_model")  # transformers 4

    class OpenVisionConfig(CLIPVisionConfig):
        """CLIP's, under a type of its own."""

        model_type = "llm2clip_openvision"

    class OpenVisionModel(CLIPVisionModel):
        """OpenVision's image tower; states and outputs as CLIP's."""

        config_class = OpenVisionConfig

        def __init__(self, config):
            super().__init__(config)
            self._core.pre_layrnorm = nn.Identity()

        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            """See PreTrainedModel; transformers 5 translates the names in files for its own classes alone."""
            renamed = {} if is_wrapped else {"key_mapping": {r"^vision_model\.": ""}}
            return super().from_pretrained(*args, **renamed, **kwargs)

        @property
        def _core(self) -> Any:
            return self.vision_model if is_wrapped else self

        def forward(self, pixel_values, output_hidden_states=None, return_dict=None):
            """See CLIPVisionModel; pools the mean of the patches."""
            if output_hidden_states is None:
                output_hidden_states = self.config.output_hidden_states
            output: Any = super().forward(pixel_values, output_hidden_states=output_hidden_states)
            output.pooler_output = self._core.post_layernorm(output.last_hidden_state[:, 1:].mean(dim=1))
            return output if return_dict is not False else output.to_tuple()

    AutoConfig.register(OpenVisionConfig.model_type, OpenVisionConfig)
    AutoModel.register(OpenVisionConfig, OpenVisionModel)
    return OpenVisionModel


ALL = {"hidden_act": "gelu", "layer_norm_eps": 1e-6}
B = {**BASE, **ALL, "intermediate_size": 3072}
L = {**LARGE, **ALL, "intermediate_size": 4096, "patch_size": 14}

FAMILY = Family(
    name="openvision",
    model_types=("llm2clip_openvision",),
    vision_class=_vision_class,
    has_cls=True,
    positions="embeddings.position_embedding.weight",
    blocks="encoder.layers",
    embeddings=("embeddings",),
    final_norm="post_layernorm",
    last_state_is_normed=False,
    file_prefix="vision_model.",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    shapes={
        "UCSC-VLAA/openvision-vit-base-patch16-224": {**B, "image_size": 224, "patch_size": 16},
        "UCSC-VLAA/openvision-vit-large-patch14-224": {**L, "image_size": 224},
        "UCSC-VLAA/openvision-vit-large-patch14-336": {**L, "image_size": 336},
    },
)
