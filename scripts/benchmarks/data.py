"""The data path against webdataset + PIL + torchvision transforms, on one core.

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.data --images 512 --scale 0.4 1

Both read the same tar of 512-pixel JPEGs, crop and resize at random, normalize, and stack batches.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, IterableDataset

from llm2clip_plugin.data.images import ImageConfig, Normalize
from scripts.benchmarks.common import (
    alternate,
    jpeg_batches,
    parse,
    print_table,
    write_shard,
)


def webdataset_batches(tar: Path, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Batches of pixels by webdataset, PIL and torchvision."""
    from torchvision import transforms
    from webdataset.compat import WebDataset

    images = ImageConfig(size=args.size)
    bicubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(
        args.size, scale=args.scale, interpolation=bicubic
    )
    normalize = transforms.Normalize(images.mean, images.std)
    preprocess = transforms.Compose([crop, transforms.ToTensor(), normalize])
    dataset: Any = WebDataset([str(tar)], shardshuffle=False, empty_check=False)
    pictures = dataset.shuffle(100).decode("pilrgb")
    pairs = pictures.to_tuple("jpg", "txt").map_tuple(preprocess, str)
    batches = cast(IterableDataset, pairs.batched(args.batch))
    for pixels, _ in DataLoader(batches, batch_size=None):
        yield pixels


def our_batches(tar: Path, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Batches of pixels by this project: index, order, read, decode, augment, choose a caption,
    stack."""
    images = ImageConfig(size=args.size)
    normalize = Normalize(images)
    batches = jpeg_batches(tar, None, images, args)
    for batch in islice(batches, math.ceil(args.images / args.batch)):
        yield normalize(batch["pixels"])


def read_all(
    batches_of: Callable[[Path, argparse.Namespace], Iterator[torch.Tensor]],
    tar: Path,
    args: argparse.Namespace,
) -> int:
    """Read the tar once; the number of images."""
    return sum(len(batch) for batch in batches_of(tar, args))


if __name__ == "__main__":
    area = ([0.9, 1.0], "least and largest area of the random crop")
    args = parse(
        __doc__,
        images=(512, "in the tar"),
        size=(224, "pixels"),
        batch=(64, "images"),
        scale=area,
    )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tar = write_shard(Path(folder), args.images)
        ways = {
            "webdataset + PIL + torchvision": partial(
                read_all, webdataset_batches, tar, args
            ),
            "llm2clip": partial(read_all, our_batches, tar, args),
        }
        runs = alternate(ways, args.rounds)
    least, largest = args.scale
    about = f"JPEGs of 512 px to {args.size} px, crops of {least:g} to {largest:g}"
    print_table(about, runs, amount=args.images, unit="images")
