"""RADIO (C-RADIO, transformers 5.24) as LLaVA sees it: the states are its first class token and the patches."""

from typing import Any

from transformers import AutoConfig, AutoModel, RadioConfig, RadioModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llm2clip_plugin.vision.family import remove_tokens


class RadioTowerConfig(RadioConfig):
    """RADIO's, under a type of its own."""

    model_type = "llm2clip_radio"


class RadioTower(RadioModel):
    """RADIO with the first class token alone, as timm has it, and without registers; no norm after the blocks."""

    config_class = RadioTowerConfig

    def forward(self, pixel_values: Any, output_hidden_states: Any = None, return_dict: bool | None = None) -> Any:
        """See RadioModel; the pooled output is the first class token, not all of the summary."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: Any = super().forward(pixel_values.to(self.dtype), output_hidden_states=bool(output_hidden_states))
        output = BaseModelOutputWithPooling(
            last_hidden_state=states.last_hidden_state,
            pooler_output=states.last_hidden_state[:, 0],
            hidden_states=states.hidden_states,
        )
        output = remove_tokens(output, 1, self.config.num_summary_tokens)
        return output if return_dict is not False else output.to_tuple()


AutoConfig.register(RadioTowerConfig.model_type, RadioTowerConfig, exist_ok=True)
AutoModel.register(RadioTowerConfig, RadioTower, exist_ok=True)
# the names of tensors in files are the Hub's
register_checkpoint_conversion_mapping(
    RadioTowerConfig.model_type, get_checkpoint_conversion_mapping("radio") or [], overwrite=True
)
