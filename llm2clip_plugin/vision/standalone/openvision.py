"""OpenVision: CLIP's architecture without the norm before the blocks; the mean of the patches, normed, is pooled.

No library has its class; this one is transformers' CLIP, of version 4 or 5.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModel

with torch.device("meta"):
    IS_WRAPPED = hasattr(CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=1)), "vision_model")  # transformers 4


class OpenVisionConfig(CLIPVisionConfig):
    """CLIP's, under a type of its own."""

    model_type = "llm2clip_openvision"


class OpenVisionModel(CLIPVisionModel):
    """OpenVision's image tower; states and outputs as CLIP's."""

    config_class = OpenVisionConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._core.pre_layrnorm = nn.Identity()

    @property
    def _core(self) -> Any:
        return self.vision_model if IS_WRAPPED else self

    def forward(self, pixel_values: Any, output_hidden_states: Any = None, return_dict: bool | None = None) -> Any:
        """See CLIPVisionModel; pools the mean of the patches."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output: Any = super().forward(pixel_values, output_hidden_states=bool(output_hidden_states))
        output.pooler_output = self._core.post_layernorm(output.last_hidden_state[:, 1:].mean(dim=1))
        return output if return_dict is not False else output.to_tuple()


AutoConfig.register(OpenVisionConfig.model_type, OpenVisionConfig, exist_ok=True)
AutoModel.register(OpenVisionConfig, OpenVisionModel, exist_ok=True)
if not IS_WRAPPED:  # the names of tensors in files are the Hub's, below vision_model
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    register_checkpoint_conversion_mapping(
        OpenVisionConfig.model_type, get_checkpoint_conversion_mapping("CLIPVisionModel") or [], overwrite=True
    )
