"""The export for sentence-transformers against ``load_dual_encoder`` and open_clip.

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.embedder [--llm PATH] --batch 8

Pictures: JPEG files of 640 x 480 through each library's own preprocessing and a ViT of one shape
with random weights, in float32. Texts: the built-in emoji's English captions, by one LLM. The
embeddings of the first two must agree.
"""

import dataclasses
import io
import random
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.stages.embedder import export_dual, open_folder, prepared
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.towers import new_tower
from scripts.benchmarks.common import alternate, parse, print_table

SHAPES = {  # of the tower: of our families, and of open_clip
    "openai/clip-vit-base-patch32": "ViT-B-32-quickgelu",
    "openai/clip-vit-base-patch16": "ViT-B-16-quickgelu",
    "openai/clip-vit-large-patch14": "ViT-L-14-quickgelu",
}
TOLERANCE = 1e-4


def write_tower(shape: str, llm: str, folder: Path) -> Path:
    """A tower directory with random weights, whose teacher is the LLM."""
    encoder = CaptionEncoder(EncoderConfig(llm=llm, compute_dtype="float32"), "cpu")
    config = DualConfig(llm_width=encoder.width, projection_dim=512)
    dual = DualEncoder(new_tower(shape), config).eval()
    teacher = dataclasses.asdict(encoder.identity())
    export_tower(dual, folder, origin=shape, teacher=teacher)
    return folder


def photographs(count: int) -> list[bytes]:
    """JPEG files of 640 x 480."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        data = io.BytesIO()
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(data, "jpeg")
        files.append(data.getvalue())
    return files


def emoji_captions(count: int) -> list[str]:
    """Short and long English captions, drawn at random."""
    source = open_source(
        SourceConfig(path="llm2clip_plugin/data/emoji/validation-noto.tar")
    )
    texts = []
    for number in range(len(source)):
        _, captions = source.captions(number)
        for caption in captions:
            if caption.language == "en" and caption.kind in ("short", "long"):
                texts.append(caption.text)
    return random.Random(0).sample(texts, min(count, len(texts)))


def main() -> None:
    options: dict[str, Any] = {
        "shape": ("openai/clip-vit-base-patch32", "of the tower", *SHAPES),
        "llm": (
            "quickstart-output/models/gemma-3-270m",
            "its folder; default: the quickstart's",
        ),
        "batch": (8, "pictures"),
        "texts": (16, "captions"),
    }
    args = parse(__doc__, rounds=3, **options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tower = write_tower(args.shape, args.llm, folder / "tower")
        model = open_folder(export_dual(tower, folder / "out"), has_code=True)
        dual = load_dual_encoder(tower, teacher=EncoderConfig(compute_dtype="float32"))
    open_clip = import_module("open_clip")
    theirs, _, transform = open_clip.create_model_and_transforms(SHAPES[args.shape])
    theirs.eval()
    pictures = photographs(args.batch)
    captions = emoji_captions(args.texts)

    @torch.no_grad()
    def by_dual() -> torch.Tensor:
        return dual.encode_image(*prepared(pictures, dual.dual))

    @torch.no_grad()
    def by_open_clip() -> torch.Tensor:
        pixels = torch.stack(
            [transform(Image.open(io.BytesIO(file))) for file in pictures]
        )
        return theirs.encode_image(pixels, normalize=True)

    @torch.no_grad()
    def texts_by_dual() -> torch.Tensor:
        return dual.encode_text(captions)

    def by_export(inputs: list[Any]) -> torch.Tensor:
        return model.encode(inputs, batch_size=len(inputs), convert_to_tensor=True)

    ways = {
        "load_dual_encoder": by_dual,
        "sentence-transformers": lambda: by_export(pictures),
    }
    runs = alternate(ways | {"open_clip": by_open_clip}, args.rounds)
    text_ways = {
        "load_dual_encoder": texts_by_dual,
        "sentence-transformers": lambda: by_export(captions),
    }
    text_runs = alternate(text_ways, args.rounds)
    for runs_of_ways in (runs, text_runs):
        _, ours = runs_of_ways["load_dual_encoder"][-1]
        _, exported = runs_of_ways["sentence-transformers"][-1]
        if (ours - exported).norm(dim=1).max() > TOLERANCE:
            raise SystemExit("the export embeds otherwise")
    print_table(
        f"pictures, {args.shape}, float32", runs, amount=args.batch, unit="pictures"
    )
    print_table("texts, float32", text_runs, amount=len(captions), unit="texts")


if __name__ == "__main__":
    main()
