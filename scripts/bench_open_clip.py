"""Training on shards against open_clip: its own ``train_one_epoch`` over webdataset, ours on the same tower.

    python scripts/bench_open_clip.py [--tower vit-s] [--batch 16] [--steps 8] [--rounds 3]

Both train the same tower and text adapter from the same weights with InfoNCE and AdamW on the same tar of 512-pixel
JPEGs, whose captions' embeddings are known: open_clip's loader looks them up in memory in place of its tokenizer, ours
reads its cache. One loader process each. A round is ``--steps`` steps of each way, the start of its loader included;
the ways alternate. Prints JSON: images a second by wall time, and the ratios (smallest, median, largest).
"""

import json
import math
import statistics
import tempfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench import alternate, argument_parser, median_seconds, speedups
from bench_step import OPTIM, TOWERS, jpeg_batches, make_dual, our_step, write_jpegs
from torch import Tensor, nn

from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.train.engine import start_ranks
from llm2clip_plugin.train.model import trained_parameters
from llm2clip_plugin.train.optim import parameter_groups
from llm2clip_plugin.vision.dual import DualEncoder


class OpenClipModel(nn.Module):
    """A dual encoder that answers as open_clip's models do: a dictionary of features and the scale."""

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        self.dual = dual
        self.logit_scale = dual.logit_scale

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        image, text, *_ = self.dual(images, texts)
        return {"image_features": image, "text_features": text, "logit_scale": self.logit_scale.exp()}


def open_clip_epoch(dual: DualEncoder, folder: Path, options: Namespace) -> Any:
    """A call trains ``options.steps`` steps with open_clip's trainer."""
    from open_clip import ClipLoss, image_transform
    from open_clip_train.train import train_one_epoch

    source = open_source(SourceConfig(path=str(folder)))
    cache = EmbeddingCache.open(folder / "cache")
    embeddings: dict[str, Tensor] = {}
    for shard in source.shards:
        for index in range(shard.size):
            key, captions = source.captions(shard.start + index)
            embeddings[captions[0].text] = cache.rows(shard.name, index, captions, key=key)[0]
    settings = SimpleNamespace(
        batch_size=options.batch,
        world_size=1,
        rank=0,
        device="cpu",
        precision="fp32",
        distill=False,
        accum_freq=1,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=OPTIM.max_grad_norm,
        log_every_n_steps=10**9,
        wandb=False,
        distributed=False,
    )
    model = OpenClipModel(dual)
    groups = parameter_groups(trained_parameters(dual, OPTIM), OPTIM.weight_decay)
    adam = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    loss = ClipLoss()
    transform = image_transform(224, is_train=True)

    def epoch() -> None:
        loader = webdataset_loader(folder / "00000.tar", transform, embeddings, options)
        data = SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)
        train_one_epoch(model, {"train": data}, loss, 0, adam, None, None, None, settings)

    return epoch


def webdataset_loader(tar: Path, transform: Any, embeddings: dict[str, Tensor], options: Namespace) -> Any:
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
        wds.batched(options.batch, partial=False),
    ]
    dataset = wds.DataPipeline(*stages).with_epoch(options.steps)
    loader = wds.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=1, persistent_workers=True)
    loader.num_batches, loader.num_samples = options.steps, options.steps * options.batch
    return loader


def our_epoch(dual: DualEncoder, folder: Path, options: Namespace) -> Any:
    """A call trains ``options.steps`` steps with the package's step and loader."""
    step = our_step(dual, options.batch)

    def epoch() -> None:
        batches = jpeg_batches(folder, batch=options.batch, workers=1)
        for _ in range(options.steps):
            loss, _ = step(next(batches))
            assert math.isfinite(loss)

    return epoch


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--tower", default="vit-s", choices=list(TOWERS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    start_ranks()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jpegs(folder, 64)
        ways = {
            "open_clip": open_clip_epoch(make_dual(options.tower), folder, options),
            "llm2clip": our_epoch(make_dual(options.tower), folder, options),
        }
        runs = alternate(ways, options.rounds)
    images = options.steps * options.batch
    ratios = sorted(speedups(runs["llm2clip"], runs["open_clip"], "wall"))
    result = {
        "tower": options.tower,
        "threads": torch.get_num_threads(),
        "images_per_s": {way: round(images / median_seconds(of_way, "wall"), 2) for way, of_way in runs.items()},
        "times_faster": [round(value, 3) for value in (ratios[0], statistics.median(ratios), ratios[-1])],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
