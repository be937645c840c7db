"""What the first-day page starts from: a folder of pictures with captions, and tiny models under
the Hub's names."""

import itertools
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "yellow": (240, 200, 30),
}
SHAPES = ("circle", "square", "triangle")
PLACES = {"on the left": 0.3, "in the middle": 0.5, "on the right": 0.7}
SIZES = {"small": 8, "large": 16}
LLM = "meta-llama/Llama-3.2-1B-Instruct"
TOWER = "openai/clip-vit-large-patch14-336"


def draw(
    size: str, color: str, shape: str, side: str, rng: random.Random
) -> Image.Image:
    """A picture of 72 x 64 pixels: a shape on light paper, with a little of everything else at
    random."""
    image = Image.new("RGB", (72, 64), tuple(rng.randint(225, 255) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    radius = SIZES[size] + rng.randint(-2, 2)
    x = round(72 * PLACES[side])
    y = rng.randint(24, 40)
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=COLORS[color])
    elif shape == "square":
        pen.rectangle(box, fill=COLORS[color])
    else:
        pen.polygon(
            [(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)],
            fill=COLORS[color],
        )
    return image


def make_photos(folder: Path) -> None:
    """photos/NUMBER.jpg, .txt and .json: 72 pictures, each with a short and a long caption of its
    own."""
    rng = random.Random(0)
    photos = folder / "photos"
    photos.mkdir(parents=True)
    for number, (size, color, shape, side) in enumerate(
        itertools.product(SIZES, COLORS, SHAPES, PLACES)
    ):
        name = photos / f"{number:04d}.jpg"
        draw(size, color, shape, side, rng).save(name, quality=90)
        long = f"A {size} {shape} of {color} ink, drawn {side} of light paper."
        name.with_suffix(".txt").write_text(
            f"{size} {color} {shape} {side}\n", encoding="utf-8"
        )
        name.with_suffix(".json").write_text(
            json.dumps({"long_caption": long}), encoding="utf-8"
        )


def make_models(folder: Path) -> None:
    """The page's LLM and tower in tiny, where their names lead if they are read as paths."""
    import torch
    from tiny_clip import TINY
    from tiny_llm import save_tiny_llm
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from llm2clip_plugin.vision.export import save_tower

    save_tiny_llm(folder / LLM, "llama")
    torch.manual_seed(0)
    (folder / TOWER).mkdir(parents=True)
    save_tower(
        CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **TINY)),
        folder / TOWER,
    )
