"""Training on shards against open_clip: its own ``train_one_epoch`` over webdataset, ours on the
same tower.

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.open_clip --batch 8 [--open-clip CHECKOUT]

Both train the same tower and text adapter from the same weights with InfoNCE and AdamW on the same
tar of 512-pixel JPEGs, whose captions' embeddings are known: open_clip's loader looks them up in
memory in place of its tokenizer, ours reads its cache. One loader process each. A round is
``--steps`` steps of each way, the start of its loader included.
"""

import math
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.train.engine import start_ranks
from llm2clip_plugin.vision.dual import DualEncoder
from scripts.benchmarks.common import alternate, jpeg_batches, parse, print_table
from scripts.benchmarks.step import (
    OPTIM,
    TOWERS,
    bare_adam,
    make_dual,
    our_step,
    write_training_data,
)


def their_epoch(
    dual: DualEncoder, folder: Path, embeddings: dict[str, Tensor], args: Namespace
) -> Callable[[], None]:
    """A call trains ``args.steps`` steps with the trainer of open_clip 3 or 4."""
    open_clip = import_module("open_clip")
    train = import_module("open_clip_train.train")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = SimpleNamespace(
        distill=False,
        horovod=False,
        wandb=False,
        distributed=False,
        world_size=1,
        rank=0,
        accum_freq=1,
        batch_size=args.batch,
        log_every_n_steps=10**9,
        device=device,
        precision="fp32",
        skip_scheduler=True,
        grad_clip_norm=OPTIM.max_grad_norm,
    )
    forward = dual.to(device).forward
    loss = open_clip.ClipLoss()
    scale = dual.logit_scale

    def features(image: Tensor, text: Tensor) -> dict[str, Tensor]:
        image_bD, text_bD, *_ = forward(image, text)
        return {
            "image_features": image_bD,
            "text_features": text_bD,
            "logit_scale": scale.exp(),
        }

    dual.forward = features  # type: ignore[assignment] # as open_clip's models answer
    adam = bare_adam(dual)

    def epoch_of_3() -> None:
        data = {"train": their_loader(folder / "00000.tar", embeddings, args)}
        train.train_one_epoch(dual, data, loss, 0, adam, None, None, None, settings)

    if not hasattr(train, "TrainState"):
        return epoch_of_3
    state = train.TrainState(open_clip.CLIPTask(dual, loss=loss), adam)

    def epoch_of_4() -> None:
        data = {"train": their_loader(folder / "00000.tar", embeddings, args)}
        train.train_one_epoch(state, data, settings)

    return epoch_of_4


def their_loader(tar: Path, embeddings: dict[str, Tensor], args: Namespace) -> Any:
    """open_clip's ``get_wds_dataset``, but for its reader of tars, which fails with webdataset
    1.0."""
    data: Any = import_module("open_clip_train.data")
    transform = import_module("open_clip").image_transform(224, is_train=True)
    data.tarfile_to_samples_nothrow = data.wds.tarfile_to_samples()
    settings = SimpleNamespace(
        train_data=str(tar),
        dataset_resampled=True,
        train_data_upsampling_factors=None,
        train_num_samples=args.steps * args.batch,
        batch_size=args.batch,
        workers=1,
        world_size=1,
    )

    def look_up(text: str) -> Tensor:
        return embeddings[text.strip()][None]

    return data.get_wds_dataset(settings, transform, is_train=True, tokenizer=look_up)


def our_epoch(dual: DualEncoder, folder: Path, args: Namespace) -> Callable[[], None]:
    """A call trains ``args.steps`` steps with the package's step and loader."""
    step = our_step(dual, args.batch)
    cache = EmbeddingCache.open(folder / "cache")

    def epoch() -> None:
        batches = jpeg_batches(folder, cache, ImageConfig(size=224), args, workers=1)
        for batch in islice(batches, args.steps):
            loss, _ = step(batch)
            assert math.isfinite(loss)

    return epoch


if __name__ == "__main__":
    checkout = ("", "checkout of its repository; default: what is installed")
    sizes = {
        "tower": ("vit-s", "shape", *TOWERS),
        "batch": (16, "images a step"),
        "steps": (8, "a round"),
    }
    args = parse(
        __doc__, open_clip=checkout, **sizes, scale=([0.9, 1.0], "area of our crops")
    )
    if args.open_clip:
        sys.path.insert(0, f"{args.open_clip}/src")
    start_ranks()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        embeddings = write_training_data(folder, 64)
        theirs = their_epoch(make_dual(args.tower), folder, embeddings, args)
        ours = our_epoch(make_dual(args.tower), folder, args)
        runs = alternate({"open_clip": theirs, "llm2clip": ours}, args.rounds)
    version = sys.modules["open_clip"].__version__
    about = f"{args.tower}, batch {args.batch}, {args.steps} steps a round, open_clip {version}"
    print_table(about, runs, amount=args.steps * args.batch, unit="images")
