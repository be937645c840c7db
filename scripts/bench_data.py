"""This project's data path against the usual one, on one core: webdataset + PIL + torchvision transforms.

Both read the same tars of 512-pixel JPEGs, crop and resize at random, normalize, and stack batches. They alternate in
one process, so that their ratio is reliable on a noisy machine. Prints Markdown.

    python scripts/bench_data.py --images 512 --repeats 5
"""

import io
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core each; before torch is imported

import numpy as np
import torch
import tyro
from bench import Run, alternate, write_tar
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from llm2clip_plugin.data.images import ImageConfig, Normalize, TrainTransform
from llm2clip_plugin.data.loader import make_loader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.sampler import sample_rng
from llm2clip_plugin.data.samples import AugmentConfig
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Images per second of one core, this project's data path against webdataset + PIL + torchvision."""

    images: int = 512  # JPEGs in two tars
    side: int = 512  # pixels of the JPEGs
    quality: int = 95  # of the JPEGs; img2dataset's default
    size: int = 224  # pixels of the tower
    scale: tuple[float, float] = (0.9, 1.0)  # area of the random crop
    batch: int = 64  # images
    repeats: int = 5  # timed runs of each
    data: str = ""  # folder of tars to read instead of generated images


def main(config: BenchConfig) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(config.data or folder)
        if not config.data:
            write_tars(data, config)
        tars = sorted(str(path) for path in data.rglob("*.tar"))
        kilobytes = sum(os.path.getsize(tar) for tar in tars) / config.images / 1000
        paths = {
            "webdataset + PIL + torchvision": lambda: count(webdataset_batches(tars, config)),
            "this project": lambda: count(own_batches(str(data), config)),
        }
        runs = alternate(paths, config.repeats)
        print(f"{config.images} JPEGs of {config.side} px, quality {config.quality}, {kilobytes:.0f} kB each, to")
        print(
            f"{config.size} px, crop scale {config.scale[0]:g} to {config.scale[1]:g}, batches of {config.batch}, one"
        )
        print(f"process, one thread, {config.repeats} runs each; {platform.processor() or platform.machine()}, torch")
        print(f"{torch.__version__}, Pillow {Image.__version__}. Median [lowest, highest].\n")
        print(as_table(runs))
        if not config.data:
            print(
                f"\nMean difference per pixel from decoding at full size: {difference(str(data), config):.2f} of 255."
            )


def photo_like(rng: np.random.Generator, side: int) -> Image.Image:
    """Colored noise whose amplitude falls as f^-1.45: its JPEG is about as large as a photograph's."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = 1
    fields = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) / frequency**1.45).real for _ in range(3)]
    fields = [(field - field.mean()) / field.std() for field in fields]
    pixels = np.stack([0.8 * fields[0] + 0.3 * field for field in fields], axis=-1) * 45 + 120
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_tars(folder: Path, config: BenchConfig) -> None:
    """Two tars as img2dataset writes them."""
    rng = np.random.default_rng(0)
    for number in range(2):
        samples = range(number * config.images // 2, (number + 1) * config.images // 2)
        write_tar(
            folder / f"{number:05d}.tar", (file for index in samples for file in sample_files(rng, index, config))
        )


def sample_files(rng: np.random.Generator, index: int, config: BenchConfig) -> Iterator[tuple[str, bytes]]:
    """Name and content of a sample's files."""
    image = io.BytesIO()
    photo_like(rng, config.side).save(image, "JPEG", quality=config.quality)
    text = f"picture {index}"
    yield f"{index:09d}.jpg", image.getvalue()
    yield f"{index:09d}.json", json.dumps({"caption": text}).encode()
    yield f"{index:09d}.txt", text.encode()


def webdataset_batches(tars: list[str], config: BenchConfig) -> Iterator[torch.Tensor]:
    """Batches of pixels by webdataset, PIL and torchvision."""
    from torchvision import transforms
    from webdataset.compat import WebDataset

    images = ImageConfig(size=config.size)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                config.size, scale=config.scale, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.ToTensor(),
            transforms.Normalize(images.mean, images.std),
        ]
    )
    dataset = WebDataset(tars, shardshuffle=False, empty_check=False)
    dataset = dataset.shuffle(100).decode("pilrgb").to_tuple("jpg", "txt").map_tuple(transform, str)
    batches = cast(IterableDataset, dataset.batched(config.batch))  # its methods are typed as those of a mix-in
    for pixels, _ in DataLoader(batches, batch_size=None):
        yield pixels


def own_batches(data: str, config: BenchConfig) -> Iterator[torch.Tensor]:
    """Batches of pixels by this project: index, order, read, decode, augment, choose a caption, stack."""
    normalize = Normalize(ImageConfig(size=config.size))
    source = open_source(SourceConfig(path=data))
    dataset = PairDataset([source], [None], ImageConfig(size=config.size), AugmentConfig(scale=config.scale), seed=0)
    for batch in islice(make_loader(dataset, local_batch=config.batch), -(-len(source) // config.batch)):
        yield normalize(batch["pixels"])


def count(batches: Iterator[torch.Tensor]) -> int:
    """Number of images in all batches."""
    return sum(len(batch) for batch in batches)


def as_table(runs: dict[str, list[Run[int]]]) -> str:
    """Markdown; ratios are those of the rounds, against the first row."""
    base = next(iter(runs.values()))
    lines = ["| data path | images a processor second | ratio |", "|---|---|---|"]
    for name, timed_runs in runs.items():
        speeds = [run.result / run.cpu for run in timed_runs]
        ratios = [speed / (other.result / other.cpu) for speed, other in zip(speeds, base, strict=True)]
        lines.append(f"| {name} | {summary(speeds, '.0f')} | {summary(ratios, '.2f')} |")
    return "\n".join(lines)


def summary(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def difference(data: str, config: BenchConfig) -> float:
    """Mean absolute difference, of 255, between this project's crops and the same ones decoded at full size."""
    source = open_source(SourceConfig(path=data))
    images = ImageConfig(size=config.size)
    small = TrainTransform(images, AugmentConfig(scale=config.scale))
    full = TrainTransform(images, AugmentConfig(scale=config.scale, decode_margin=1e9))  # never at a smaller scale
    total = 0.0
    for number in range(32):
        pair = [step.pixels(source[number].read_image(), sample_rng(0, 0, 0, number)) for step in (small, full)]
        total += float(np.abs(pair[0].astype(int) - pair[1]).mean())
    return total / 32


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
