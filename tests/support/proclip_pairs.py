"""The pairs on which ProCLIP's own code and the recipe are trained (golden/proclip): the images of
golden/authors turned and mirrored, each with the embeddings of two captions, and a CLIP's features
of these."""

from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

INPUTS = Path(__file__).parents[1] / "golden" / "authors" / "inputs.safetensors"
TURNS = 8  # four quarters, then the same mirrored
CLIP_WIDTH = 16
CAPTIONS = ("short", "raw")


@cache
def inputs() -> dict[str, Tensor]:
    return load_file(INPUTS)


def base_and_turn(row: int) -> tuple[int, int]:
    """Rows repeat after 320 x 8 = 2560."""
    count = len(inputs()["pixels"])
    return row % count, row // count % TURNS


def pixels(row: int) -> Tensor:
    """(16, 16, 3) uint8."""
    base, turn = base_and_turn(row)
    image = inputs()["pixels"][base].rot90(turn % 4)
    if turn >= 4:
        image = image.flip(1)
    return image.contiguous()


def embedding(row: int, caption: str) -> Tensor:
    """(24,) float32 with values of float16, as caches hold them."""
    base, turn = base_and_turn(row)
    other = base + 7 * CAPTIONS.index(caption)
    rows = inputs()["embeddings"]
    return rows[other % len(rows)].float().roll(3 * turn)


def clip_feature(row: int, caption: str) -> Tensor:
    """(16,) float32 with values of float16; of any length."""
    return embedding(row, caption)[:CLIP_WIDTH].flip(0)
