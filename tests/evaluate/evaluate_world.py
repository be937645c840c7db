"""A small world on disk: coloured squares with captions, a tiny exported tower."""

import json
from pathlib import Path

import torch
from PIL import Image
from tiny_clip import VISION
from tiny_data import WIDTH, encoded, made_up
from tiny_llm import save_tiny_llm
from transformers import CLIPVisionConfig, CLIPVisionModel

from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 220),
    "white": (240, 240, 240),
}
GERMAN = {"red": "rot", "green": "grün", "blue": "blau", "white": "weiß"}


def square(colour, shade):
    image = Image.new(
        "RGB", (32, 32), tuple(max(0, value - shade) for value in COLOURS[colour])
    )
    return encoded(image, "PNG")


def write_data(folder: Path, shades=(0, 20, 40)) -> Path:
    """Three shades of each colour; the shades of a colour are one concept with the same
    captions."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for colour in COLOURS:
        for shade in shades:
            name = f"{colour}-{shade}.png"
            (folder / "images" / name).write_bytes(square(colour, shade))
            texts = {
                "long_caption": [
                    f"a square that is {colour} all over",
                    f"nothing but {colour}",
                ]
            }
            texts |= {
                "caption": f"a {colour} square",
                "captions": [{"text": GERMAN[colour], "language": "de"}],
            }
            rows.append(
                {"id": name, "image": f"images/{name}", "colour": colour, **texts}
            )
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_dual():
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION | {"image_size": 32})).eval()
    return DualEncoder(
        tower, DualConfig(projection_dim=16, llm_width=WIDTH, adapter_blocks=1)
    ).eval()


def write_tower(directory: Path, identity=None) -> Path:
    export_tower(
        tiny_dual(), directory, origin="tiny", teacher=vars(identity or made_up())
    )
    return directory


def write_llm(folder: Path, seed: int = 0) -> Path:
    """A random two-block Llama of the teacher's width, without a chat template."""
    return save_tiny_llm(folder, "llama", seed=seed, width=WIDTH, template=False)


def write_llm_and_tower(folder: Path) -> tuple[Path, Path]:
    """A tower whose card names the LLM next to it as its teacher."""
    llm = write_llm(folder / "llm")
    identity = CaptionEncoder(
        EncoderConfig(llm=str(llm), compute_dtype="float32"), "cpu"
    ).identity()
    return llm, write_tower(folder / "tower", identity)
