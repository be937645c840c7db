"""DINOv3 (transformers 5): rotary positions for any grid; the states leave out its register tokens."""

import functools

from llm2clip_plugin.vision.family import IMAGENET_MEAN, IMAGENET_STD, Family, newer_transformers, remove_tokens


@functools.lru_cache(maxsize=1)
def _vision_class() -> type:
    class DINOv3ViTModel(newer_transformers("DINOv3ViTModel", title="DINOv3", since="5")):  # the Hub's class name
        """DINOv3 whose states are the class token and the patches, without registers."""

        def forward(self, pixel_values, output_hidden_states=None):
            """See DINOv3ViTModel; removes the registers between class token and patches."""
            if output_hidden_states is None:
                output_hidden_states = self.config.output_hidden_states
            output = super().forward(pixel_values, output_hidden_states=output_hidden_states)
            return remove_tokens(output, 1, 1 + self.config.num_register_tokens)

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
