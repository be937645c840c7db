"""DINOv3 (transformers 5): rotary positions for any grid; the states leave out its register tokens."""

import functools
from typing import Any

from llm2clip_plugin.vision.family import IMAGENET_MEAN, IMAGENET_STD, Family


@functools.lru_cache(maxsize=1)
def _vision_class() -> type:
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise ValueError(f"DINOv3 requires transformers 5 or newer; {transformers.__version__} is installed")

    class DINOv3ViTModel(transformers.DINOv3ViTModel):  # the Hub's class name, which config.json keeps
        """DINOv3 whose states are the class token and the patches, without registers."""

        def forward(self, pixel_values, output_hidden_states=None):
            """See DINOv3ViTModel; removes the registers between class token and patches."""
            if output_hidden_states is None:
                output_hidden_states = self.config.output_hidden_states
            output: Any = super().forward(pixel_values, output_hidden_states=output_hidden_states)
            first_patch = 1 + self.config.num_register_tokens

            def without_registers(state):
                return state[:, [0, *range(first_patch, state.shape[1])]]

            output.last_hidden_state = without_registers(output.last_hidden_state)
            if output_hidden_states:
                output.hidden_states = tuple(without_registers(state) for state in output.hidden_states)
            return output

    return DINOv3ViTModel


FAMILY = Family(
    name="dinov3",
    model_types=("dinov3_vit",),
    vision_class=_vision_class,
    has_cls=True,
    positions="",
    blocks="model.layer",
    embeddings=("embeddings",),
    final_norm="norm",
    last_state_is_normed=True,
    never_trained=("embeddings.mask_token",),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    needs="transformers>=5",
)
