"""The data path against webdataset + PIL + torchvision transforms, on one core.

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.data --images 512 --scale 0.4 1

Both read the same tar of 512-pixel JPEGs, crop and resize at random, normalize, and stack batches.
"""

import argparse
import tempfile
from collections.abc import Iterator
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
    steps = [crop, transforms.ToTensor(), transforms.Normalize(images.mean, images.std)]
    dataset = (
        WebDataset([str(tar)], shardshuffle=False, empty_check=False)
        .shuffle(100)
        .decode("pilrgb")
    )
    pairs: Any = dataset.to_tuple("jpg", "txt").map_tuple(
        transforms.Compose(steps), str
    )
    for pixels, _ in DataLoader(
        cast(IterableDataset, pairs.batched(args.batch)), batch_size=None
    ):
        yield pixels


def own_batches(tar: Path, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Batches of pixels by this project: index, order, read, decode, augment, choose a caption,
    stack."""
    batches = jpeg_batches(tar, None, images := ImageConfig(size=args.size), args)
    return map(
        Normalize(images),
        (batch["pixels"] for batch in islice(batches, -(-args.images // args.batch))),
    )


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
    ways = {
        "webdataset + PIL + torchvision": webdataset_batches,
        "llm2clip": own_batches,
    }
    with tempfile.TemporaryDirectory() as folder:
        tar = write_shard(Path(folder), args.images)
        runs = alternate(
            {
                n: lambda way=way: sum(map(len, way(tar, args)))
                for n, way in ways.items()
            },
            args.rounds,
        )
    about = f"JPEGs of 512 px to {args.size} px, crops of {args.scale[0]:g} to {args.scale[1]:g}"
    print_table(about, runs, amount=args.images, unit="images")
