"""DINOv3 (transformers 5) as LLaVA sees it: the states are the class token and the patches, without registers."""

from typing import Any

from transformers import AutoConfig, AutoModel, DINOv3ViTConfig, DINOv3ViTModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from llm2clip_plugin.vision.family import remove_tokens


class Dinov3TowerConfig(DINOv3ViTConfig):
    """DINOv3's, under a type of its own."""

    model_type = "llm2clip_dinov3"


class Dinov3Tower(DINOv3ViTModel):
    """DINOv3 without the registers between class token and patches."""

    config_class = Dinov3TowerConfig

    def forward(self, pixel_values: Any, output_hidden_states: Any = None, return_dict: bool | None = None) -> Any:
        """See DINOv3ViTModel; the number of a state, which transformers 5 may give, is answered with all states."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = super().forward(pixel_values, output_hidden_states=bool(output_hidden_states))
        output = remove_tokens(output, 1, 1 + self.config.num_register_tokens)
        return output if return_dict is not False else output.to_tuple()


AutoConfig.register(Dinov3TowerConfig.model_type, Dinov3TowerConfig, exist_ok=True)
AutoModel.register(Dinov3TowerConfig, Dinov3Tower, exist_ok=True)
# the names of tensors in files are the Hub's
register_checkpoint_conversion_mapping(
    Dinov3TowerConfig.model_type, get_checkpoint_conversion_mapping("dinov3_vit") or [], overwrite=True
)
