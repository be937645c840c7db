"""The tower inside LLaVA against LLaVA's own CLIPVisionTower on the same directory: images a second.

    .venv-llava/bin/python -m benchmarks.llava                                                # a random ViT-B/16
    .venv-llava/bin/python -m benchmarks.llava --shape l14-336 --dtype float16 --images 64    # on a GPU

Both encode through LLaVA's ``encode_images`` (tower and projector); the outputs must be equal bit for bit.
"""

# LLaVA may not be installed where types are checked:
# pyright: reportMissingImports=false

import json
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from transformers import CLIPVisionConfig, CLIPVisionModel, logging

from benchmarks.common import alternate, parser, print_table
from llm2clip_plugin.vision.export import export_tower

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
SHAPES = {
    "tiny": (64, 4, 4, 56, 14),
    "b16": (768, 12, 12, 224, 16),
    "l14-336": (1024, 24, 16, 336, 14),
}


def make_tower(shape: str, folder: Path) -> Path:
    """A CLIP tower directory of that shape with random weights."""
    sizes: dict[str, Any] = dict(zip(SIZES, SHAPES[shape], strict=True))
    config = CLIPVisionConfig(**sizes, intermediate_size=4 * SHAPES[shape][0])
    torch.manual_seed(0)
    export_tower(CLIPVisionModel(config).eval(), folder, origin=f"random weights of shape {shape}")
    return folder


def make_llava(tower: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A small LLaVA with our tower."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    width = json.loads((tower / "config.json").read_text())["hidden_size"]
    eye = {"mm_vision_tower": f"llm2clip:{tower}", "mm_vision_select_layer": -2, "mm_hidden_size": width}
    settings: dict[str, Any] = {**sizes, **eye, "vocab_size": 1000, "mm_projector_type": "mlp2x_gelu"}
    model: Any = LlavaLlamaForCausalLM(LlavaConfig(**settings))
    model.get_vision_tower().load_model()
    return model.to(device=device, dtype=dtype).eval()


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(rounds=9)
    options.add_argument("--shape", choices=SHAPES, default="b16", help="shape of the random tower")
    options.add_argument("--images", type=int, default=8, help="images per call of encode_images")
    options.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args = options.parse_args()
    logging.set_verbosity_error()  # the tower's weights in LLaVA's checkpoint, which it ignores
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        tower = make_tower(args.shape, Path(scratch) / "tower")
        model = make_llava(tower, device, dtype)
        own = CLIPVisionTower(str(tower), SimpleNamespace(mm_vision_select_layer=-2, vision_tower=str(tower)))
    towers = {"LLaVA's own tower": own.to(device=device, dtype=dtype), "llm2clip": model.get_vision_tower()}
    size = SHAPES[args.shape][3]
    images = torch.randn(args.images, 3, size, size).to(device=device, dtype=dtype)

    def encode(name: str) -> torch.Tensor:
        model.model.vision_tower = towers[name]
        with torch.inference_mode():
            return model.encode_images(images)

    runs = alternate({name: partial(encode, name) for name in towers}, args.rounds)
    assert torch.equal(*(of_tower[-1].result for of_tower in runs.values())), "the towers differ"
    print_table(f"encode_images, {args.shape}, {args.dtype}", runs, amount=args.images, unit="images")


if __name__ == "__main__":
    main()
