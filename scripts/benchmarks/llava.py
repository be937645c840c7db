"""The tower inside LLaVA against LLaVA's own CLIPVisionTower on the same directory: images a
second.

    .venv-llava/bin/python -m scripts.benchmarks.llava    # a random ViT-B/16
    # on a GPU
    .venv-llava/bin/python -m scripts.benchmarks.llava --shape l14-336 --dtype float16 --images 64

Both encode through LLaVA's ``encode_images`` (tower and projector); the outputs must be equal bit
for bit.
"""

# LLaVA may not be installed where types are checked:
# pyright: reportMissingImports=false

import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from transformers import CLIPVisionConfig, CLIPVisionModel, logging

from llm2clip_plugin.vision.export import export_tower
from scripts.benchmarks.common import DTYPES, alternate, parse, print_table

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
SHAPES = {
    "tiny": (64, 4, 4, 56, 14),
    "b16": (768, 12, 12, 224, 16),
    "l14-336": (1024, 24, 16, 336, 14),
}
SELECT = {"mm_vision_select_layer": -2}


def make_llava(shape: str, folder: Path) -> Any:
    """A small LLaVA whose eye is a random CLIP of that shape, which is written to ``folder``."""
    width = SHAPES[shape][0]
    sizes = dict[str, Any](zip(SIZES, SHAPES[shape], strict=True))
    torch.manual_seed(0)
    eye: Any = CLIPVisionModel(CLIPVisionConfig(**sizes, intermediate_size=4 * width))
    export_tower(eye.eval(), folder, origin=f"random weights of shape {shape}")
    llm = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vision: dict[str, Any] = {
        "mm_vision_tower": f"llm2clip:{folder}",
        "mm_hidden_size": width,
        "mm_projector_type": "mlp2x_gelu",
        **SELECT,
    }
    config = LlavaConfig(**llm, **vision, vocab_size=1000)
    model: Any = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model()
    return model.eval()


if __name__ == "__main__":
    tower = {
        "shape": ("b16", "of the random tower", *SHAPES),
        "dtype": ("float32", "of the tower", *DTYPES),
    }
    args = parse(__doc__, rounds=9, images=(8, "per call of encode_images"), **tower)
    logging.set_verbosity_error()  # the tower's weights in LLaVA's checkpoint, which it ignores
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tower"
        model = make_llava(args.shape, folder)
        settings = SimpleNamespace(**SELECT, vision_tower=str(folder))
        llavas_tower = CLIPVisionTower(str(folder), settings)
    device_and_dtype = {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": getattr(torch, args.dtype),
    }
    model.to(**device_and_dtype)
    towers = {
        "LLaVA's own tower": llavas_tower.to(**device_and_dtype),
        "llm2clip": model.get_vision_tower(),
    }
    side = SHAPES[args.shape][3]
    images = torch.randn(args.images, 3, side, side).to(**device_and_dtype)

    def encode(name: str) -> torch.Tensor:
        model.model.vision_tower = towers[name]
        with torch.inference_mode():
            return model.encode_images(images)

    runs = alternate({name: partial(encode, name) for name in towers}, args.rounds)
    last_outputs = [runs_of_tower[-1][1] for runs_of_tower in runs.values()]
    assert torch.equal(*last_outputs), "the towers differ"
    about = f"encode_images, {args.shape}, {args.dtype}"
    print_table(about, runs, amount=args.images, unit="images")
