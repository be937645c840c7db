"""Towers of transformers in another form: DINOv3 and RADIO without registers, AIMv2 that pools, and OpenVision.

``forward`` ignores other arguments: transformers 5 passes the language model's, such as ``use_cache``, to the tower.

This file stands alone, as it is saved with a LLaVA that is exported to Hugging Face. transformers 4 lacks some of the
bases.
"""

from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


def remove_tokens(output: Any, start: int, stop: int) -> Any:
    """A model's output whose states (B, T, H) lack the tokens ``start`` to ``stop - 1``, such as registers."""

    def kept(state: Any) -> Any:
        return state[:, [*range(start), *range(stop, state.shape[1])]]

    output.last_hidden_state = kept(output.last_hidden_state)
    if output.hidden_states is not None:
        output.hidden_states = tuple(kept(state) for state in output.hidden_states)
    return output


def all_states(tower: Any, chosen: Any) -> bool:
    """Whether states are asked for; transformers 5 may give the number of one, which is answered with all."""
    return bool(tower.config.output_hidden_states if chosen is None else chosen)


class EvalWhileFrozen:
    """A tower that stays in eval mode as long as none of its parameters is trained, whatever ``train()`` says.

    In training mode DINOv3 draws a scale of its rotary positions at every call.
    """

    def train(self: Any, mode: bool = True) -> Any:
        """See torch.nn.Module."""
        mode = mode and any(parameter.requires_grad for parameter in self.parameters())
        return nn.Module.train(self, mode)


def register(config: Any, model: Any, stock: str) -> None:
    """Let AutoModel open a tower; the names of tensors in its files are the Hub's, as those of ``stock``."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    try:
        from transformers import conversion_mapping as mapping
    except ImportError:  # transformers 4, whose modules have the Hub's names
        return
    renamed = mapping.get_checkpoint_conversion_mapping(stock) or []
    mapping.register_checkpoint_conversion_mapping(config.model_type, renamed, overwrite=True)


class OpenVisionConfig(CLIPVisionConfig):
    """CLIP's, under a type of its own."""

    model_type = "llm2clip_openvision"


class OpenVisionModel(CLIPVisionModel):
    """CLIP's tower without the norm before the blocks; the mean of the patches, normed, is pooled."""

    config_class = OpenVisionConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._core.pre_layrnorm = nn.Identity()

    @property
    def _core(self) -> Any:
        return getattr(self, "vision_model", self)  # in transformers 4

    def forward(
        self, pixel_values: Any, output_hidden_states: Any = None, return_dict: bool | None = None, **_: Any
    ) -> Any:
        """See CLIPVisionModel."""
        output: Any = super().forward(pixel_values, output_hidden_states=all_states(self, output_hidden_states))
        output.pooler_output = self._core.post_layernorm(output.last_hidden_state[:, 1:].mean(dim=1))
        return output if return_dict is not False else output.to_tuple()


register(OpenVisionConfig, OpenVisionModel, "CLIPVisionModel")

if hasattr(transformers, "Aimv2VisionModel"):

    class Aimv2Tower(transformers.Aimv2VisionModel):
        """AIMv2 that reads the tower of an image-text model too, and pools without a head."""

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            """See PreTrainedModel; in the file of an image-text model the tower is below ``vision_model``."""
            return super().from_pretrained(*args, key_mapping={r"^vision_model\.": ""}, **kwargs)

        def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
            """See PreTrainedModel; without ``vision_model``, wherever the tower came from."""
            super().save_pretrained(*args, save_original_format=False, **kwargs)

        def forward(self, pixel_values: Any, **kwargs: Any) -> Any:
            """See Aimv2VisionModel; the pooled output of a tower without a head is the mean of its normed patches."""
            output: Any = super().forward(pixel_values, **kwargs)
            if output.pooler_output is None:
                output.pooler_output = output.last_hidden_state.mean(dim=1)
            return output


if hasattr(transformers, "DINOv3ViTModel"):

    class Dinov3TowerConfig(transformers.DINOv3ViTConfig):
        """DINOv3's, under a type of its own."""

        model_type = "llm2clip_dinov3"

    class Dinov3Tower(EvalWhileFrozen, transformers.DINOv3ViTModel):
        """DINOv3 without the registers between class token and patches."""

        config_class = Dinov3TowerConfig

        def forward(
            self, pixel_values: Any, output_hidden_states: Any = None, return_dict: bool | None = None, **_: Any
        ) -> Any:
            """See DINOv3ViTModel."""
            output = super().forward(pixel_values, output_hidden_states=all_states(self, output_hidden_states))
            output = remove_tokens(output, 1, 1 + self.config.num_register_tokens)
            return output if return_dict is not False else output.to_tuple()

    register(Dinov3TowerConfig, Dinov3Tower, "dinov3_vit")

if hasattr(transformers, "RadioModel"):

    class RadioTowerConfig(transformers.RadioConfig):
        """RADIO's, under a type of its own."""

        model_type = "llm2clip_radio"

    class RadioTower(EvalWhileFrozen, transformers.RadioModel):
        """RADIO with the first class token alone, as timm has it, and without registers; no norm after the blocks."""

        config_class = RadioTowerConfig

        def forward(
            self, pixel_values: Any, output_hidden_states: Any = None, return_dict: bool | None = None, **_: Any
        ) -> Any:
            """See RadioModel; the pooled output is the first class token, not all of the summary."""
            asked = all_states(self, output_hidden_states)
            states: Any = super().forward(pixel_values.to(self.dtype), output_hidden_states=asked)
            output = BaseModelOutputWithPooling(
                last_hidden_state=states.last_hidden_state,
                pooler_output=states.last_hidden_state[:, 0],
                hidden_states=states.hidden_states,
            )
            output = remove_tokens(output, 1, self.config.num_summary_tokens)
            return output if return_dict is not False else output.to_tuple()

    register(RadioTowerConfig, RadioTower, "radio")
