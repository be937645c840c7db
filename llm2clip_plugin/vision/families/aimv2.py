"""AIMv2 (transformers 5): no class token; learned positions, or sinusoidal ones for any grid
(``native``)."""

from llm2clip_plugin.vision.families import Family, in_transformers, wrapped

# the other sizes are the configuration's defaults
L = {"intermediate_size": 2816, "use_head": False}

FAMILY = Family(
    name="aimv2",
    model_types=("aimv2_vision_model", "aimv2"),
    vision_class=wrapped("Aimv2Tower", of="Aimv2VisionModel", title="AIMv2", since="5"),
    has_cls=False,
    positions="embeddings.position_embedding.weight",  # absent from native models
    final_norm="rms_norm",
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
