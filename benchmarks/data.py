"""The data path against webdataset + PIL + torchvision transforms, on one core.

    OMP_NUM_THREADS=1 python -m benchmarks.data --images 512 --scale 0.4 1

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

from benchmarks.common import alternate, parser, print_table, write_shard
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.samples import AugmentConfig
from llm2clip_plugin.data.sources import SourceConfig, open_source


def webdataset_batches(tar: Path, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Batches of pixels by webdataset, PIL and torchvision."""
    from torchvision import transforms
    from webdataset.compat import WebDataset

    images, bicubic = ImageConfig(size=args.size), transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(args.size, scale=args.scale, interpolation=bicubic)
    steps = [crop, transforms.ToTensor(), transforms.Normalize(images.mean, images.std)]
    dataset = WebDataset([str(tar)], shardshuffle=False, empty_check=False).shuffle(100).decode("pilrgb")
    pairs: Any = dataset.to_tuple("jpg", "txt").map_tuple(transforms.Compose(steps), str)
    for pixels, _ in DataLoader(cast(IterableDataset, pairs.batched(args.batch)), batch_size=None):
        yield pixels


def own_batches(tar: Path, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Batches of pixels by this project: index, order, read, decode, augment, choose a caption, stack."""
    images, augment = ImageConfig(size=args.size), AugmentConfig(scale=tuple(args.scale))
    source, normalize = open_source(SourceConfig(path=str(tar))), Normalize(images)
    dataset = PairDataset([source], [None], images, augment, seed=0)
    for batch in islice(PairLoader(dataset, local_batch=args.batch), -(-len(source) // args.batch)):
        yield normalize(batch["pixels"])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=512)
    options.add_argument("--size", type=int, default=224, help="pixels of the tower")
    options.add_argument("--scale", type=float, nargs=2, default=[0.9, 1.0], help="area of the random crop")
    options.add_argument("--batch", type=int, default=64)
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tar = write_shard(Path(folder), args.images)
        ways = {
            "webdataset + PIL + torchvision": lambda: sum(map(len, webdataset_batches(tar, args))),
            "llm2clip": lambda: sum(map(len, own_batches(tar, args))),
        }
        runs = alternate(ways, args.rounds)
    about = f"JPEGs of 512 px to {args.size} px, crops of {args.scale[0]:g} to {args.scale[1]:g}"
    print_table(about, runs, amount=args.images, unit="images")


if __name__ == "__main__":
    main()
