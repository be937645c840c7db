"""DINOv3 (transformers 5): rotary positions for any grid; the states leave out its register tokens."""

import functools

from llm2clip_plugin.vision.family import IMAGENET_MEAN, IMAGENET_STD, Family, newer_transformers, under_the_hubs_name


@functools.lru_cache(maxsize=1)
def _vision_class() -> type:
    base = newer_transformers("DINOv3ViTModel", title="DINOv3", since="5")
    from llm2clip_plugin.vision.standalone.dinov3 import Dinov3Tower

    return under_the_hubs_name(Dinov3Tower, base)


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
