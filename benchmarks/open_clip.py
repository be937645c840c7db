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

from benchmarks.common import alternate, parser, print_table, write_shard
from llm2clip_plugin.contracts import TeacherIdentity
from llm2clip_plugin.data.cache import CacheWriter, EmbeddingCache, caption_rows, shard_captions
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.train.config import LossConfig, OptimConfig, TrainConfig
from llm2clip_plugin.train.engine import Engine, start_ranks
from llm2clip_plugin.train.losses.base import weighted_terms
from llm2clip_plugin.train.model import trained_parameters
from llm2clip_plugin.train.optim import complete, parameter_groups
from llm2clip_plugin.train.step import TowerStep
from llm2clip_plugin.vision import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder

TOWERS = {"tiny": (32, 2, 2, 64), "vit-s": (384, 12, 6, 1536), "vit-b": (768, 12, 12, 3072)}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
TEACHER = TeacherIdentity(
    llm="random", revision="", weights_sha256="0" * 64, adapter_sha256="", attention="causal", pooling="last",
    layer=-1, prompt="", chat_template="", max_tokens=64, width=640,
)  # fmt: skip
OPTIM = OptimConfig(lr=1e-4, layer_decay=0.85, max_grad_norm=5.0)


def make_dual(name: str) -> DualEncoder:
    """A CLIP tower of patches of 16 at 224 pixels with random weights, and the paper's adapter."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(zip(SIZES, TOWERS[name], strict=True))
    tower = CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=16, **sizes))
    return DualEncoder(tower, DualConfig(projection_dim=512, llm_width=TEACHER.width)).train()


def write_training_data(folder: Path, count: int) -> None:
    """A shard of 512-pixel JPEGs with a cache of random embeddings in ``folder``/cache."""
    write_shard(folder, count)
    source, writer = open_source(SourceConfig(path=str(folder))), CacheWriter(folder / "cache", TEACHER)
    for shard in source.shards:
        keys, captions = shard_captions(source, shard)
        rows = caption_rows(captions)
        writer.write_shard(shard.name, keys, rows, torch.randn(len(rows), TEACHER.width))
    writer.finish()


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
    groups = parameter_groups(trained_parameters(dual, OPTIM), OPTIM.weight_decay)
    train, hidden_size = TrainConfig(global_batch=args.batch, precision="fp32"), dual.tower.config.hidden_size
    zero = {"zero_optimization": {"stage": 0}}
    config = complete(zero, train, OPTIM, world=1, hidden_size=hidden_size)
    engine = Engine(dual, groups, OPTIM, config)
    normalize, losses = Normalize(ImageConfig(), engine.device), weighted_terms(LossConfig())
    step = TowerStep(engine, losses, seed=0, text_noise=False, normalize=normalize)
    source, cache = open_source(SourceConfig(path=str(folder))), EmbeddingCache.open(folder / "cache")

    def epoch() -> None:
        dataset = PairDataset([source], [cache], ImageConfig(size=224), seed=0)
        for batch in islice(PairLoader(dataset, local_batch=args.batch, workers=1), args.steps):
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
