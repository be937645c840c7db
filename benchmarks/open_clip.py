"""Training on shards against open_clip: its own ``train_one_epoch`` over webdataset, ours on the same tower.

    OMP_NUM_THREADS=1 python -m benchmarks.open_clip --batch 8 --steps 24

Both train the same tower and text adapter from the same weights with InfoNCE and AdamW on the same tar of 512-pixel
JPEGs, whose captions' embeddings are known: open_clip's loader looks them up in memory in place of its tokenizer, ours
reads its cache. One loader process each. A round is ``--steps`` steps of each way, the start of its loader included.
"""

import math
import tempfile
from argparse import Namespace
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import alternate, parser, print_table
from benchmarks.step import OPTIM, TOWERS, jpeg_batches, make_dual, our_step, write_training_data
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.train.engine import start_ranks
from llm2clip_plugin.train.model import trained_parameters
from llm2clip_plugin.train.optim import parameter_groups
from llm2clip_plugin.vision.dual import DualEncoder


class OpenClipModel(nn.Module):
    """A dual encoder that answers as open_clip's models do: a dictionary of features and the scale."""

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        self.dual, self.logit_scale = dual, dual.logit_scale

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        image, text, *_ = self.dual(images, texts)
        return {"image_features": image, "text_features": text, "logit_scale": self.logit_scale.exp()}


def open_clip_epoch(dual: DualEncoder, folder: Path, args: Namespace) -> Callable[[], None]:
    """A call trains ``args.steps`` steps with open_clip's trainer."""
    from open_clip import ClipLoss, image_transform
    from open_clip_train.train import train_one_epoch

    source, cache = open_source(SourceConfig(path=str(folder))), EmbeddingCache.open(folder / "cache")
    embeddings: dict[str, Tensor] = {}
    for number in range(len(source)):
        key, captions = source.captions(number)
        embeddings[captions[0].text] = cache.rows(*source.locate(number), captions, key=key)[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = SimpleNamespace(
        **dict.fromkeys(("distill", "horovod", "wandb", "distributed"), False),
        **{"world_size": 1, "rank": 0, "accum_freq": 1, "batch_size": args.batch, "log_every_n_steps": 10**9},
        **{"device": device, "precision": "fp32", "skip_scheduler": True, "grad_clip_norm": OPTIM.max_grad_norm},
    )
    model, loss, transform = OpenClipModel(dual).to(device), ClipLoss(), image_transform(224, is_train=True)
    groups = parameter_groups(trained_parameters(dual, OPTIM), OPTIM.weight_decay)
    adam = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)

    def epoch() -> None:
        loader = webdataset_loader(folder / "00000.tar", transform, embeddings, args)
        data = SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)
        train_one_epoch(model, {"train": data}, loss, 0, adam, None, None, None, settings)

    return epoch


def webdataset_loader(tar: Path, transform: Any, embeddings: dict[str, Tensor], args: Namespace) -> Any:
    """The stages of open_clip's ``get_wds_dataset``, whose own reader of tars fails with webdataset 1.0."""
    import webdataset

    wds: Any = webdataset  # its names are made when they are first used
    stages = [
        wds.ResampledShards(str(tar), deterministic=True),
        wds.tarfile_to_samples(),
        wds.shuffle(5000, initial=1000),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=lambda text: embeddings[text.strip()]),
        wds.to_tuple("image", "text"),
        wds.batched(args.batch, partial=False),
    ]
    dataset = wds.DataPipeline(*stages).with_epoch(args.steps)
    loader = wds.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=1, persistent_workers=True)
    loader.num_batches, loader.num_samples = args.steps, args.steps * args.batch
    return loader


def our_epoch(dual: DualEncoder, folder: Path, args: Namespace) -> Callable[[], None]:
    """A call trains ``args.steps`` steps with the package's step and loader."""
    step = our_step(dual, args.batch)

    def epoch() -> None:
        for batch in islice(jpeg_batches(folder, batch=args.batch, workers=1), args.steps):
            assert math.isfinite(step(batch)[0])

    return epoch


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tower", default="vit-s", choices=list(TOWERS))
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--steps", type=int, default=8, help="steps a round")
    args = options.parse_args()
    start_ranks()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_training_data(folder, 64)
        ways = {
            "open_clip": open_clip_epoch(make_dual(args.tower), folder, args),
            "llm2clip": our_epoch(make_dual(args.tower), folder, args),
        }
        runs = alternate(ways, args.rounds, wall=True)
    about = f"{args.tower}, batch {args.batch}, {args.steps} steps a round, seconds of the clock"
    print_table(about, runs, amount=args.steps * args.batch, unit="images")


if __name__ == "__main__":
    main()
