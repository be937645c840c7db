"""A training step against a bare forward/backward/AdamW loop on the same tensors.

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.step --towers vit-s vit-b --batch 8

Both ways train the same dual encoder from the same weights, and their first losses must agree.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.contracts import TeacherIdentity
from llm2clip_plugin.data.cache_file import caption_rows, shard_captions
from llm2clip_plugin.data.cache_writer import CacheWriter
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.train.config import LossConfig, OptimConfig, Precision, TrainConfig
from llm2clip_plugin.train.engine import Engine, start_ranks
from llm2clip_plugin.train.losses.base import weighted_terms
from llm2clip_plugin.train.model import trained_parameters
from llm2clip_plugin.train.optim import complete, parameter_groups
from llm2clip_plugin.train.step import TowerStep
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from scripts.benchmarks.common import alternate, parse, print_table, write_shard
from scripts.benchmarks.loss import full_loss

TOWERS = {
    "tiny": (32, 2, 2, 64),
    "vit-s": (384, 12, 6, 1536),
    "vit-b": (768, 12, 12, 3072),
}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
TEACHER = TeacherIdentity(
    llm="random",
    revision="",
    weights_sha256="0" * 64,
    adapter_sha256="",
    attention="causal",
    pooling="last",
    layer=-1,
    prompt="",
    chat_template="",
    max_tokens=64,
    width=640,
)
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # of the first loss; bf16 has three digits
OPTIM = OptimConfig(lr=1e-4, layer_decay=0.85, max_grad_norm=5.0)


def make_dual(name: str) -> DualEncoder:
    """A CLIP tower of patches of 16 at 224 pixels with random weights, and the paper's adapter."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(zip(SIZES, TOWERS[name], strict=True))
    tower = CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=16, **sizes))
    config = DualConfig(projection_dim=512, llm_width=TEACHER.width)
    return DualEncoder(tower, config).train()


def make_batch(size: int) -> dict[str, Any]:
    """Random pixels and embeddings, made once."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.arange(size)
    pixels = torch.randint(
        0, 256, (size, 224, 224, 3), dtype=torch.uint8, generator=generator
    )
    embeddings = torch.randn(size, TEACHER.width, generator=generator)
    return {
        "pixels": pixels,
        "embeddings": embeddings,
        "caption_hashes": numbers,
        "image_ids": numbers,
        "keys": [str(number) for number in range(size)],
        "position": size,
    }


def bare_adam(dual: DualEncoder) -> torch.optim.Optimizer:
    """torch's AdamW with the groups and settings of ours."""
    groups = parameter_groups(trained_parameters(dual, OPTIM), OPTIM.weight_decay)
    return torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)


def bare_step(
    dual: DualEncoder, batch: dict[str, Any], device: torch.device, *, bf16: bool
) -> Callable[[], float]:
    normalize = Normalize(ImageConfig(), device)
    optimizer = bare_adam(dual)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            pixels = normalize(batch["pixels"])
            image, text, *_ = dual(pixels, batch["embeddings"].to(device))
            loss = full_loss(image, text, dual.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dual.parameters(), OPTIM.max_grad_norm)
        optimizer.step()
        return loss.item()

    return step


def our_step(
    dual: DualEncoder,
    size: int,
    precision: Precision = "fp32",
    *,
    stage: int = 0,
    world: int = 1,
    bucket: float = 1.0,
) -> TowerStep:
    """The training step of this project; bucket: factor of DeepSpeed's reduce_bucket_size."""
    groups = parameter_groups(trained_parameters(dual, OPTIM), OPTIM.weight_decay)
    train = TrainConfig(global_batch=size * world, precision=precision)
    hidden_size = dual.tower.config.hidden_size
    config = complete(
        {"zero_optimization": {"stage": stage}},
        train,
        OPTIM,
        world=world,
        hidden_size=hidden_size,
    )
    zero = config["zero_optimization"]
    zero["reduce_bucket_size"] = int(zero.get("reduce_bucket_size", 5e8) * bucket)
    engine = Engine(dual, groups, OPTIM, config)
    return TowerStep(
        engine,
        weighted_terms(LossConfig()),
        normalize=Normalize(ImageConfig(), engine.device),
        seed=0,
        text_noise=False,
    )


def write_training_data(folder: Path, count: int) -> dict[str, Tensor]:
    """A shard of 512-pixel JPEGs with a cache of random embeddings in ``folder``/cache; caption ->
    embedding."""
    path = write_shard(folder, count)
    source = open_source(SourceConfig(path=str(path)))
    (shard,) = source.shards
    keys, captions = shard_captions(source, shard)
    writer = CacheWriter(folder / "cache", TEACHER)
    embeddings = torch.randn(count, TEACHER.width)
    writer.write_shard(shard.name, keys, caption_rows(captions), embeddings)
    writer.finish()
    embedding_of = {}
    for (caption,), embedding in zip(captions, embeddings, strict=True):
        embedding_of[caption.text] = embedding
    return embedding_of


if __name__ == "__main__":
    towers = (["vit-s", "vit-b"], "shapes", *TOWERS)
    precision = ("fp32", "bf16: under autocast if bare", *TOLERANCE)
    args = parse(
        __doc__, towers=towers, batch=(8, "images a step"), precision=precision
    )
    device = start_ranks()
    for name in args.towers:
        dual = make_dual(name)
        batch = make_batch(args.batch)
        same_dual = copy.deepcopy(dual).to(device)
        bare = bare_step(same_dual, batch, device, bf16=args.precision == "bf16")
        ours = partial(our_step(dual, args.batch, args.precision), batch)
        # before rounding lets the weights drift apart
        bare_loss = bare()
        our_loss, _ = ours()
        if abs(bare_loss - our_loss) > TOLERANCE[args.precision]:
            raise SystemExit(f"the first losses differ: {[bare_loss, our_loss]}")
        runs = alternate({"bare loop": bare, "llm2clip": ours}, args.rounds)
        about = f"{name}, 224 px, batch {args.batch}, {args.precision}"
        print_table(about, runs, amount=args.batch, unit="images")
