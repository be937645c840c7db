"""EVA-CLIP towers (EVA02 and EVA01), written in this package."""

from __future__ import annotations

from llm2clip_plugin.vision.family import Family


def _vision_class() -> type:
    from llm2clip_plugin.vision.eva02 import Eva02VisionModel

    return Eva02VisionModel


FAMILY = Family(
    name="eva02",
    model_types=("llm2clip_eva02",),
    vision_class=_vision_class,
    has_cls=True,
    positions="embeddings.position_embedding",
    blocks="blocks",
    embeddings=("embeddings",),
    final_norm="norm",
    last_state_is_normed=True,
)
