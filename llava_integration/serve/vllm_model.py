"""vLLM's LLaVA with every tower family of this package.

vLLM builds CLIP, SigLIP and Pixtral towers from layers of its own and refuses others in two
functions, which are completed here; the class is vLLM's. Another tower runs as the Hugging Face
model that it is, whole on every GPU (with tensor parallelism too) and unquantized.

Shape letters: B images, T tokens of a tower, N image tokens, H width, S image size in pixels.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import CLIPVisionConfig, PixtralVisionConfig, SiglipVisionConfig
from vllm.model_executor.models import llava
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.vision import VisionEncoderInfo

from llava_integration.plug.checkpoints import blocks_below
from llm2clip_plugin.vision.families import family_of_type
from llm2clip_plugin.vision.parts import tower_blocks

# vLLM is installed in an environment of its own, not where types are checked.
# pyright: reportMissingImports=false

__all__ = ["LlavaForConditionalGeneration"]

# not what derives from them, as OpenVision
STOCK = (CLIPVisionConfig, SiglipVisionConfig, PixtralVisionConfig)
stock_tower = llava.init_vision_tower_for_llava
stock_info = llava.get_vision_encoder_info


class EncoderInfo(VisionEncoderInfo):
    """How many tokens a tower makes of an image; all images have its size."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Tokens before ``vision_feature_select_strategy`` drops the class token; the size does not
        matter."""
        dropped = self.hf_config.vision_feature_select_strategy == "default"
        return self.hf_config.image_seq_length + dropped

    def get_image_size(self) -> int:
        return self.vision_config.image_size

    def get_patch_size(self) -> int:
        return self.vision_config.patch_size

    def get_patch_grid_length(self) -> int:
        return self.get_image_size() // self.get_patch_size()


class Tower(nn.Module):
    """A tower of one of our families up to the hidden state that LLaVA selects; blocks above it are
    deleted."""

    def __init__(self, config: Any) -> None:
        """``config``: of the whole LLaVA. The dtype is torch's default, which vLLM sets to the
        model's."""
        super().__init__()
        fields = config.vision_config.to_dict()
        self.family = family_of_type(fields["model_type"], where="vision_config")
        fields["model_type"] = self.family.model_types[0]
        model_class = self.family.vision_class()
        self.vision = model_class.config_class.from_dict(fields)
        self.model = model_class(self.vision).eval()
        blocks = tower_blocks(self.model)
        self.state = blocks_below(config.vision_feature_layer, len(blocks))
        del blocks[max(self.state, 1) :]

    def forward(
        self, pixel_values: Tensor, feature_select_strategy: str | None = None
    ) -> Tensor:
        """(B, 3, S, S) -> (B, N, H): all tokens, or with "default" all but the first, the class
        token."""
        parameter = next(self.model.parameters())
        output = self.model(
            pixel_values.to(device=parameter.device, dtype=parameter.dtype),
            output_hidden_states=True,
        )
        kept_BNH = output.hidden_states[self.state]
        if feature_select_strategy == "default":
            kept_BNH = kept_BNH[:, 1:]
        # AIMv2's states are transposed, which vLLM's products on a CPU refuse
        return kept_BNH.contiguous()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Set the file's tensors; returns the names of those that are set. Raises ValueError for
        other tensors.

        transformers reads them, which knows the names of files where its modules have others.
        """
        read, loading_info = self.family.vision_class().from_pretrained(
            None, config=self.vision, state_dict=dict(weights), output_loading_info=True
        )
        state = self.model.state_dict()
        blocks = f"{self.family.blocks}."

        def is_above(name: str) -> bool:  # the state that LLaVA selects
            if not name.startswith(blocks):
                return False
            number = name.removeprefix(blocks).split(".")[0]
            return int(number) >= self.state

        missing = sorted(set(loading_info["missing_keys"]) & {*state})
        unexpected = loading_info["unexpected_keys"]
        unknown = sorted(name for name in unexpected if not is_above(name))
        other_shape = sorted(loading_info["mismatched_keys"])
        if missing or unknown or other_shape:
            raise ValueError(
                f"the file's vision_tower is not a {self.family.name} tower: "
                f"missing {missing or 'none'}, unknown {unknown or 'none'}, "
                f"of another shape {other_shape or 'none'}"
            )
        tensors = read.state_dict()
        for name, value in state.items():
            value.copy_(tensors[name])
        return {f"model.{name}" for name in state}


def init_vision_tower(config: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """vLLM's tower where it has one; arguments as of ``init_vision_tower_for_llava``."""
    if type(config.vision_config) in STOCK:
        return stock_tower(config, *args, **kwargs)
    return Tower(config)


def vision_encoder_info(config: Any) -> VisionEncoderInfo:
    """As ``get_vision_encoder_info``."""
    if type(config.vision_config) in STOCK:
        return stock_info(config)
    return EncoderInfo(config)


llava.init_vision_tower_for_llava = init_vision_tower
llava.get_vision_encoder_info = vision_encoder_info
