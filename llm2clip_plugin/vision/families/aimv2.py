"""AIMv2 (transformers 5): no class token; learned positions, or sinusoidal ones for any grid (``native``)."""

import functools

from llm2clip_plugin.vision.family import Family, in_transformers, newer_transformers, under_the_hubs_name


@functools.lru_cache(maxsize=1)
def _vision_class() -> type:
    base = newer_transformers("Aimv2VisionModel", title="AIMv2", since="5")

    class Aimv2VisionModel(under_the_hubs_name(base, base)):
        """AIMv2 that reads the tower of an image-text model too, and pools without a head."""

        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            """See PreTrainedModel; in the file of an image-text model the tower is below ``vision_model``."""
            return super().from_pretrained(*args, key_mapping={r"^vision_model\.": ""}, **kwargs)

        def save_pretrained(self, *args, **kwargs):
            """See PreTrainedModel; without ``vision_model``, wherever the tower came from."""
            return super().save_pretrained(*args, save_original_format=False, **kwargs)

        def forward(self, pixel_values, **kwargs):
            """See Aimv2VisionModel; the pooled output of a tower without a head is the mean of its normed patches."""
            output = super().forward(pixel_values, **kwargs)
            if output.pooler_output is None:
                output.pooler_output = output.last_hidden_state.mean(dim=1)
            return output

    return Aimv2VisionModel


L = {"intermediate_size": 2816, "use_head": False}  # the other sizes are the configuration's defaults

FAMILY = Family(
    name="aimv2",
    model_types=("aimv2_vision_model", "aimv2"),
    vision_class=_vision_class,
    has_cls=False,
    positions="embeddings.position_embedding.weight",  # absent from native models
    blocks="encoder.layers",
    embeddings=("embeddings",),
    final_norm="rms_norm",
    last_state_is_normed=True,
    pooling_head=("head",),  # of -lit models
    not_tower=("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
    image_text_class=in_transformers("Aimv2Model"),
    image_text_tensors=("visual_projection.weight",),
    needs="transformers>=5",
    shapes={
        "apple/aimv2-large-patch14-224": {**L, "image_size": 224},
        "apple/aimv2-large-patch14-336": {**L, "image_size": 336},
        "apple/aimv2-large-patch14-native": {**L, "image_size": 224, "is_native": True},
    },
)
