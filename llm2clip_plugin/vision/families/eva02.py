"""EVA-CLIP towers (EVA02 and EVA01), implemented in this package.

Sizes: EVA-CLIP's model configurations (arXiv 2303.15389, table 8; arXiv 2303.11331, table 2 for
SwiGLU's widths).
"""

from llm2clip_plugin.vision.families import BASE, LARGE, Family, TowerCode, in_module

B = {**BASE, "intermediate_size": 2048, "patch_size": 16, "rope_pretrained_grid": 16}
# int(1024 * 2.6667)
L = {**LARGE, "intermediate_size": 2730, "patch_size": 14, "rope_pretrained_grid": 16}
PLAIN = {
    "hidden_act": "gelu",
    "sub_norm": False,
    "rope": False,
    "num_attention_heads": 16,
    "patch_size": 14,
}
BIG_E = {
    **PLAIN,
    "hidden_size": 1792,
    "num_hidden_layers": 64,
    "intermediate_size": 15360,
    "post_norm": True,
}
G = {**PLAIN, "hidden_size": 1408, "num_hidden_layers": 40, "intermediate_size": 6144}

FAMILY = Family(
    name="eva02",
    model_types=("llm2clip_eva02",),
    vision_class=in_module("llm2clip_plugin.vision.eva02", "Eva02VisionModel"),
    has_cls=True,
    positions="embeddings.position_embedding",
    blocks="blocks",
    final_norm="norm",
    scale=100.0,
    code=TowerCode(file="eva02", config="Eva02Config", model="Eva02VisionModel"),
    shapes={
        "eva02-b16": {**B, "image_size": 224},
        "eva02-l14-224": {**L, "image_size": 224},
        "eva02-l14-336": {**L, "image_size": 336},
        "eva02-bige14": {**BIG_E, "image_size": 224},
        "eva01-g14": {**G, "image_size": 224},
    },
)
