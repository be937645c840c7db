"""Vision towers: families, EVA02, the text adapter, the dual encoder, export; ``convert`` for other formats.

Runs on transformers 4.37.2 to 5.x and torch 2.1 to now, with nothing beyond LLaVA's own dependencies. Here what is
read without torch: the settings of a dual encoder, and of ``llm2clip import`` and ``export``.
"""

import math
from dataclasses import dataclass

from llm2clip_plugin.options import Command

LOG_SCALE = math.log(1 / 0.07)  # where CLIP's own training starts (arXiv 2103.00020, section 2.5)


@dataclass(frozen=True, kw_only=True)
class DualConfig:
    """How image features and LLM embeddings are mapped to one space."""

    projection_dim: int = 1280  # width of the space that images and captions share
    llm_width: int = 0  # width of an LLM embedding; 0: no text adapter, only a projection
    pool: str = "pooled"  # image feature: pooled (the family's own) | cls | mean (of patches) | cls_mean (concatenated)
    # linear | mlp (LIFT's: two linear layers, GELU between) | none (the pooled feature; projection_dim is its width)
    projection: str = "linear"
    projection_norm: bool = False  # a LayerNorm before the projection
    projection_bias: bool = False  # a bias in the linear projection, initially 0
    projection_init_std: float | None = None  # std of the projection's initial weights; None: width ** -0.5
    adapter: str = "mlp"  # text adapter: mlp (the paper's) | linear | none (projection_dim is then llm_width)
    adapter_blocks: int = 4  # residual MLP blocks
    adapter_expansion: int = 2  # hidden width of a block, in multiples of llm_width
    normalise_input: bool = True  # L2-normalize LLM embeddings first
    input_scale: str = "unit"  # unit | sqrt_width: factor on the normalized embedding
    input_noise: float = 0.0  # standard deviation of Gaussian noise on the scaled embedding, in training only
    logit_scale_init: float | None = None  # natural log of the initial scale; None: the tower's own, else log(1 / 0.07)
    logit_bias_init: float | None = None  # initial value of a learned bias, for SigLIP's sigmoid loss (paper: -10)


FORMATS = {  # of llm2clip export
    "clip": "transformers' CLIPVisionModelWithProjection",
    "onnx": "image encoder for ONNX Runtime",
}


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """A vision checkpoint to import."""

    source: str  # directory, Hub id, timm:NAME, or file (.safetensors, .pt, .pth, .bin)
    output: str  # tower directory to write
    config: str | None = None  # config.json for a source without one; its fields override an existing one's
    image_size: int | None = None  # interpolate the positions to this size in pixels
    overwrite: bool = False  # replace an existing directory


IMPORT = Command(
    name="import",
    example="llm2clip import openai/clip-vit-large-patch14-336 --output towers/clip-l14-336",
    about="Convert a vision checkpoint into a tower directory.",
    settings=ImportConfig,
    arguments="source",
)
