#!/usr/bin/env python3
"""Pairs per second and peak memory of caption-contrastive fine-tuning and of a naive loop.

    scripts/bench_finetune.py speed --llm PATH     # length groups against one padded batch per side
    scripts/bench_finetune.py memory --llm PATH    # global batch 512: gradient caching against one forward pass

The naive loop pads queries and positives each to the longest of their batch, in order. Both train the same adapter on
the same pairs with the same loss, whose values must agree. Memory is measured in a new process for each
(``memory-of``: one measurement, in this process).
"""

import argparse
import json
import random
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from bench import alternate, argument_parser, in_new_process, peak_growth

from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.stages.llm.run import trained_module
from llm2clip_plugin.text.config import ContrastConfig, EncoderConfig, LoraSettings, PairsConfig
from llm2clip_plugin.text.contrast import CaptionStep, PairModule, caption_terms
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.pairs import Pair, PairBatches, open_pairs
from llm2clip_plugin.text.tokens import collate
from llm2clip_plugin.train.config import OptimConfig
from llm2clip_plugin.train.engine import Engine, start_ranks

WORDS = "a red bicycle leans against the brick wall of an old house near two sleeping dogs in the rain".split()
OPTIM = OptimConfig(lr=1e-4, betas=(0.9, 0.999), eps=1e-8)


def write_pairs(path: Path, count: int, longest: int) -> Path:
    """Short queries (4 to 12 words) and positives of mixed length, a third of them long."""
    rng = random.Random(0)
    rows = []
    for i in range(count):
        words = [*rng.choices(WORDS, k=rng.randint(4, 12)), str(i)]
        more = rng.choices(WORDS, k=rng.randint(longest // 2, longest) if i % 3 == 0 else rng.randint(4, longest // 6))
        rows.append({"query": " ".join(words), "positive": " ".join(words[-4:] + more)})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def build(
    llm: str, contrast: ContrastConfig, encoding: EncoderConfig | None = None
) -> tuple[CaptionEncoder, PairModule]:
    """The LLM with a new adapter, initialized the same each time."""
    encoding = encoding or EncoderConfig(llm=llm, compute_dtype="float32")
    encoder = CaptionEncoder(encoding, trainable_adapter=True)
    config = FinetuneConfig(encoder=encoding, lora=LoraSettings(dropout=0.0), contrast=contrast)
    return encoder, trained_module(encoder, config)


class Ours:
    """The package's step with DeepSpeed's engine."""

    def __init__(
        self, llm: str, batch: int, micro: int, contrast: ContrastConfig, encoding: EncoderConfig | None = None
    ) -> None:
        encoder, module = build(llm, contrast, encoding)
        ds_config = {
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": micro,
            "zero_optimization": {"stage": 0},
            "steps_per_print": 1 << 31,
        }
        groups = [{"params": [p for p in module.parameters() if p.requires_grad]}]
        engine = Engine(module, groups, OPTIM, ds_config, keep_frozen=False)
        self.step = CaptionStep(engine, caption_terms(contrast), encoder, contrast, seed=0)

    def __call__(self, batch: dict) -> float:
        return self.step(batch)[0]


class Plain:
    """Two padded forward passes, the full matrix of logits, AdamW."""

    def __init__(self, llm: str, contrast: ContrastConfig) -> None:
        self.encoder, self.module = build(llm, contrast)
        self.scale = contrast.scale
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.adam = torch.optim.AdamW(trained, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)

    def embed(self, texts: list[str]) -> torch.Tensor:
        rows = self.encoder.tokenize(texts)
        frames = [self.encoder.frame] * len(rows)
        batch = collate(rows, frames, pad_id=self.encoder.pad_id, include_bos=True).to(self.encoder.device)
        return F.normalize(self.module.model(batch), dim=1)

    def __call__(self, batch: dict) -> float:
        pairs: list[Pair] = batch["pairs"]
        logits = self.scale * self.embed([p.query for p in pairs]) @ self.embed([p.positive for p in pairs]).T
        target = torch.arange(len(pairs), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()
        return loss.item()


def batches(path: Path, size: int) -> PairBatches:
    return PairBatches(open_pairs(PairsConfig(data=(str(path),))), (), seed=0, global_batch=size, rank=0, world=1)


def speed(args: argparse.Namespace, folder: Path) -> dict:
    """Both ways, alternating on the same batches."""
    contrast = ContrastConfig(mask_same=False)
    ways = {"plain": Plain(args.llm, contrast), "ours": Ours(args.llm, args.batch, args.batch, contrast)}
    loader = batches(write_pairs(folder / "pairs.jsonl", args.batch * args.steps, args.longest), args.batch)
    batch_of_step = [loader.batch(step * args.batch) for step in range(args.steps)]
    steps = {name: partial(next, map(way, batch_of_step)) for name, way in ways.items()}
    runs = alternate(steps, args.steps, warm_up=False)
    rates = {name: round(args.batch / min(run.seconds for run in of_way), 3) for name, of_way in runs.items()}
    worst = max(abs(a.result - b.result) for a, b in zip(*runs.values(), strict=True))
    return {"pairs_per_s": rates, "times_faster": round(rates["ours"] / rates["plain"], 2), "loss_difference": worst}


def memory_of(args: argparse.Namespace, micro: int) -> dict:
    """Loss of one step in this process, and by how much it raises the peak memory."""
    start_ranks()
    with tempfile.TemporaryDirectory() as folder:
        way = Ours(args.llm, args.batch, micro, ContrastConfig(mask_same=False))
        pairs = write_pairs(Path(folder) / "pairs.jsonl", args.batch, args.longest)
        batch = batches(pairs, args.batch).batch(0)
        growth, loss = peak_growth(lambda: way(batch), cuda=torch.cuda.is_available())
    return {"loss": loss, "gib": growth / 2**30}


def memory(args: argparse.Namespace) -> dict:
    """``memory_of`` in a new process for each micro-batch."""
    micro_batches = {"one forward pass": args.batch, "gradient caching": args.micro or args.batch // 16}
    return {
        f"{name}, micro-batch {micro}": in_new_process(memory_of, args, micro) for name, micro in micro_batches.items()
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("what", choices=("speed", "memory", "memory-of"))
    parser.add_argument("--llm", required=True)
    parser.add_argument("--batch", type=int, default=0, help="pairs; 64 for speed, 512 for memory")
    parser.add_argument("--micro", type=int, default=0, help="micro-batch for memory; default: a 16th of the batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--longest", type=int, default=90, help="words of the longest positive")
    args = parser.parse_args()
    args.batch = args.batch or (64 if args.what == "speed" else 512)
    if args.what == "memory-of":
        print(json.dumps(memory_of(args, args.micro or args.batch)))
        return
    if args.what == "memory":
        results = memory(args)
    else:
        start_ranks()
        with tempfile.TemporaryDirectory() as folder:
            results = speed(args, Path(folder))
    print(json.dumps({"threads": torch.get_num_threads(), **results}))


if __name__ == "__main__":
    main()
