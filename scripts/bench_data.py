"""Benchmark the data path against webdataset + PIL + torchvision transforms, on one core.

Both read the same tars of 512-pixel JPEGs, crop and resize at random, normalize, and stack batches. They run in turns
in one process, so the ratio holds on a noisy machine. Prints Markdown.

    python scripts/bench_data.py --images 512 --repeats 5
"""

from __future__ import annotations

import io
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core each; before torch is imported

import numpy as np
import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader

from llm2clip_plugin.data.augment import AugmentConfig, TrainTransform
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import PairDataset, make_loader
from llm2clip_plugin.data.sampler import sample_rng
from llm2clip_plugin.data.sources.open import SourceConfig, open_source


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Images per second of one core, this project's data path against webdataset + PIL + torchvision."""

    images: int = 512  # JPEGs in two tars
    side: int = 512  # pixels of the JPEGs
    quality: int = 95  # of the JPEGs; img2dataset's default
    size: int = 224  # pixels of the tower
    scale: tuple[float, float] = (0.9, 1.0)  # area of the random crop
    batch: int = 64  # images
    repeats: int = 5  # runs of each
    data: str = ""  # folder of tars to read instead of generated images


def main(config: BenchConfig) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(config.data or folder)
        if not config.data:
            write_tars(data, config)
        tars = sorted(str(path) for path in data.rglob("*.tar"))
        kilobytes = sum(os.path.getsize(tar) for tar in tars) / config.images / 1000
        paths: dict[str, Callable[[], int]] = {
            "webdataset + PIL + torchvision": lambda: count(webdataset_batches(tars, config)),
            "this project": lambda: count(own_batches(str(data), config)),
        }
        speeds = take_turns(paths, config.repeats)
        print(f"{config.images} JPEGs of {config.side} px, quality {config.quality}, {kilobytes:.0f} kB each, to")
        print(
            f"{config.size} px, crop scale {config.scale[0]:g} to {config.scale[1]:g}, batches of {config.batch}, one"
        )
        print(f"process, one thread, {config.repeats} turns each; {platform.processor() or platform.machine()}, torch")
        print(f"{torch.__version__}, Pillow {Image.__version__}. Median [lowest, highest].\n")
        print(as_table(speeds))
        if not config.data:
            print(f"\nMean difference of a pixel from decoding in full: {difference(str(data), config):.2f} of 255.")


def photo_like(rng: np.random.Generator, side: int) -> Image.Image:
    """Colored noise with an amplitude of f^-1.45, whose JPEG is about as large as that of a photograph."""
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
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(number * config.images // 2, (number + 1) * config.images // 2):
                image = io.BytesIO()
                photo_like(rng, config.side).save(image, "JPEG", quality=config.quality)
                text = f"picture {index}"
                for extension, data in (
                    ("jpg", image.getvalue()),
                    ("json", json.dumps({"caption": text}).encode()),
                    ("txt", text.encode()),
                ):
                    member = tarfile.TarInfo(f"{index:09d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def webdataset_batches(tars: list[str], config: BenchConfig) -> Iterator[torch.Tensor]:
    """Decode and augment with webdataset and torchvision."""
    import webdataset
    from torchvision import transforms

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
    dataset = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    dataset = dataset.shuffle(100).decode("pilrgb").to_tuple("jpg", "txt").map_tuple(transform, str)
    for pixels, _ in DataLoader(dataset.batched(config.batch), batch_size=None):
        yield pixels


def own_batches(data: str, config: BenchConfig) -> Iterator[torch.Tensor]:
    """This project's path: index, order, read, decode, augment, choose a caption, stack."""
    source = open_source(SourceConfig(path=data))
    dataset = PairDataset([source], [None], ImageConfig(size=config.size), AugmentConfig(scale=config.scale), seed=0)
    for batch in islice(make_loader(dataset, local_batch=config.batch), -(-len(source) // config.batch)):
        yield batch["pixel_values"]


def count(batches: Iterator[torch.Tensor]) -> int:
    """Number of images."""
    return sum(len(batch) for batch in batches)


def take_turns(paths: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Images a second of processor time in each turn; the first turn of each is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(repeats + 1):
        for name, run in paths.items():
            started = time.process_time()  # so that other work on the machine doesn't count
            images = run()
            if turn:
                speeds[name].append(images / (time.process_time() - started))
    return speeds


def as_table(speeds: dict[str, list[float]]) -> str:
    """Markdown; the ratio is taken turn by turn against the first row."""
    first = next(iter(speeds.values()))
    lines = ["| data path | images a processor second | ratio |", "|---|---|---|"]
    for name, values in speeds.items():
        ratios = [value / base for value, base in zip(values, first, strict=True)]
        lines.append(f"| {name} | {summary(values, '.0f')} | {summary(ratios, '.2f')} |")
    return "\n".join(lines)


def summary(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def difference(data: str, config: BenchConfig) -> float:
    """Mean absolute difference, of 255, between this path and the same crops decoded in full."""
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
