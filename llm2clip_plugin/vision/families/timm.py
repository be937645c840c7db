"""Any timm vision transformer, by name: ``timm:vit_base_patch16_224``. Training environment only
(timm 1.0)."""

from llm2clip_plugin.vision.families import Family, TowerCode, in_module

FAMILY = Family(
    name="timm",
    model_types=("llm2clip_timm",),
    vision_class=in_module("llm2clip_plugin.vision.wrapped", "TimmTower"),
    has_cls=False,  # the states leave out all prefix tokens
    positions="model.pos_embed",
    blocks="model.blocks",
    embeddings=(
        "model.patch_embed",
        "model.cls_token",
        "model.reg_token",
        "model.pos_embed",
        "model.norm_pre",
    ),
    final_norm="model.norm",
    pooling_head=("model.attn_pool", "model.fc_norm"),
    needs="timm>=1.0",
    code=TowerCode(file="wrapped", config="TimmVitConfig", model="TimmTower"),
)
