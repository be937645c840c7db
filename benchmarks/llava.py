"""The tower inside LLaVA against LLaVA's own CLIPVisionTower on the same directory: images a second.

    .venv-llava/bin/python -m benchmarks.llava                                                # a random ViT-B/16
    .venv-llava/bin/python -m benchmarks.llava --shape l14-336 --dtype float16 --images 64    # on a GPU

Both encode through LLaVA's ``encode_images`` (tower and projector); the outputs must be equal bit for bit.
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

from benchmarks.common import alternate, parser, print_table
from llm2clip_plugin.vision.export import export_tower

SHAPES = {  # width, blocks, heads, pixels, patch
    "tiny": (64, 4, 4, 56, 14),
    "b16": (768, 12, 12, 224, 16),
    "l14-336": (1024, 24, 16, 336, 14),
}


def make_llava(shape: str, folder: Path) -> Any:
    """A small LLaVA whose eye is a random CLIP of that shape, which is written to ``folder``."""
    width, blocks, heads, pixels, patch = SHAPES[shape]
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "image_size": pixels,
    }
    torch.manual_seed(0)
    eye: Any = CLIPVisionModel(CLIPVisionConfig(**sizes, patch_size=patch, intermediate_size=4 * width))
    export_tower(eye.eval(), folder, origin=f"random weights of shape {shape}")
    llm = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    see = {"mm_vision_tower": f"llm2clip:{folder}", "mm_vision_select_layer": -2, "mm_hidden_size": width}
    settings: dict[str, Any] = {**llm, **see, "vocab_size": 1000, "mm_projector_type": "mlp2x_gelu"}
    model: Any = LlavaLlamaForCausalLM(LlavaConfig(**settings))
    model.get_vision_tower().load_model()
    return model.eval()


def main() -> None:
    options = parser(__doc__, rounds=9)
    options.add_argument("--shape", choices=SHAPES, default="b16", help="shape of the random tower")
    options.add_argument("--images", type=int, default=8, help="images per call of encode_images")
    options.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args = options.parse_args()
    logging.set_verbosity_error()  # the tower's weights in LLaVA's checkpoint, which it ignores
    with tempfile.TemporaryDirectory() as scratch:
        model = make_llava(args.shape, tower := Path(scratch) / "tower")
        own = CLIPVisionTower(str(tower), SimpleNamespace(mm_vision_select_layer=-2, vision_tower=str(tower)))
    place = {"device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": getattr(torch, args.dtype)}
    model.to(**place)
    towers = {"LLaVA's own tower": own.to(**place), "llm2clip": model.get_vision_tower()}
    size = SHAPES[args.shape][3]
    images = torch.randn(args.images, 3, size, size).to(**place)

    def encode(name: str) -> torch.Tensor:
        model.model.vision_tower = towers[name]
        with torch.inference_mode():
            return model.encode_images(images)

    runs = alternate({name: partial(encode, name) for name in towers}, args.rounds)
    assert torch.equal(*(of_tower[-1].result for of_tower in runs.values())), "the towers differ"
    print_table(f"encode_images, {args.shape}, {args.dtype}", runs, amount=args.images, unit="images")


if __name__ == "__main__":
    main()
