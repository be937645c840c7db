"""Any timm vision transformer, by name: ``timm:vit_base_patch16_224``. Training environment only (timm 1.0)."""

from llm2clip_plugin.vision.family import Family


def _vision_class() -> type:
    from llm2clip_plugin.vision.towers import TimmTower

    return TimmTower


FAMILY = Family(
    name="timm",
    model_types=("llm2clip_timm",),
    vision_class=_vision_class,
    has_cls=False,  # the states leave out all prefix tokens
    positions="model.pos_embed",
    blocks="model.blocks",
    embeddings=("model.patch_embed", "model.cls_token", "model.reg_token", "model.pos_embed", "model.norm_pre"),
    final_norm="model.norm",
    last_state_is_normed=True,
    pooling_head=("model.attn_pool", "model.fc_norm"),
    needs="timm>=1.0",
)
