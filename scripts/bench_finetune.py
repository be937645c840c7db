#!/usr/bin/env python3
"""Pairs per second and peak memory of caption-contrastive fine-tuning and of a naive loop.

    scripts/bench_finetune.py speed --llm PATH     # length groups against one padded batch per side
    scripts/bench_finetune.py memory --llm PATH    # global batch 512: gradient caching against one forward pass

The naive loop pads queries and positives each to the longest of their batch, in order. Both train the same adapter on
the same pairs with the same loss, whose values must agree. Memory is measured in a separate process for each.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.stages.llm.run import trained_module
from llm2clip_plugin.text.adapter import LoraSettings
from llm2clip_plugin.text.contrast import CaptionStep, ContrastConfig, PairModule, caption_terms
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.pair_batches import PairBatches
from llm2clip_plugin.text.pairs import Pair, PairsConfig, open_pairs
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.text.tokens import collate
from llm2clip_plugin.train.engine import Engine, start_ranks

WORDS = "a red bicycle leans against the brick wall of an old house near two sleeping dogs in the rain".split()
ADAM = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8}


def write_pairs(path: Path, count: int, longest: int) -> Path:
    """Short queries (4 to 12 words) and positives of very mixed length (a third of them long)."""
    rng = random.Random(0)
    rows = []
    for i in range(count):
        words = [*rng.choices(WORDS, k=rng.randint(4, 12)), str(i)]
        more = rng.choices(WORDS, k=rng.randint(longest // 2, longest) if i % 3 == 0 else rng.randint(4, longest // 6))
        rows.append({"query": " ".join(words), "positive": " ".join(words[-4:] + more)})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def build(llm: str, contrast: ContrastConfig) -> tuple[CaptionEncoder, PairModule]:
    """The LLM with a new adapter, initialized the same each time."""
    encoding = EncoderConfig(llm=llm, compute_dtype="float32")
    encoder = CaptionEncoder(encoding, trainable_adapter=True)
    config = FinetuneConfig(encoder=encoding, lora=LoraSettings(dropout=0.0), contrast=contrast)
    return encoder, trained_module(encoder, config)


class Ours:
    """The package's step with DeepSpeed's engine."""

    def __init__(self, llm: str, batch: int, micro: int, contrast: ContrastConfig) -> None:
        encoder, module = build(llm, contrast)
        ds_config = {
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": micro,
            "zero_optimization": {"stage": 0},
            "steps_per_print": 1 << 31,
        }
        groups = [{"params": [p for p in module.parameters() if p.requires_grad]}]
        engine = Engine(module, groups, ADAM, ds_config, keep_frozen=False)
        self.step = CaptionStep(engine, caption_terms(contrast), encoder, contrast, seed=0)

    def __call__(self, batch: dict) -> float:
        return self.step(batch)[0]


class Plain:
    """Two padded forward passes, the full matrix of logits, AdamW."""

    def __init__(self, llm: str, contrast: ContrastConfig) -> None:
        self.encoder, self.module = build(llm, contrast)
        self.scale = contrast.scale
        self.adam = torch.optim.AdamW([p for p in self.module.parameters() if p.requires_grad], **ADAM)

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
    """Both in turns on the same batches; on a CPU process time."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    contrast = ContrastConfig(mask_same=False)
    ways = {"plain": Plain(args.llm, contrast), "ours": Ours(args.llm, args.batch, args.batch, contrast)}
    loader = batches(write_pairs(folder / "pairs.jsonl", args.batch * args.steps, args.longest), args.batch)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(args.steps):
        batch = loader.batch(step * args.batch)
        for name, way in ways.items():
            started = clock()
            losses[name].append(way(batch))
            seconds[name].append(clock() - started)
    rates = {name: round(args.batch / min(times), 3) for name, times in seconds.items()}
    worst = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    return {"pairs_per_s": rates, "times_faster": round(rates["ours"] / rates["plain"], 2), "loss_difference": worst}


def memory_of(args: argparse.Namespace, folder: Path) -> dict:
    """Peak memory of one step in this process, above that before the step."""
    contrast = ContrastConfig(mask_same=False)
    way = Ours(args.llm, args.batch, args.micro or args.batch, contrast)
    loader = batches(write_pairs(folder / "pairs.jsonl", args.batch, args.longest), args.batch)
    batch = loader.batch(0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = way(batch)
        return {"loss": loss, "gib": (torch.cuda.max_memory_allocated() - before) / 2**30}
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which loading the LLM has set (Linux)
    before = resident("VmRSS")
    loss = way(batch)
    return {"loss": loss, "gib": resident("VmHWM") - before}


def resident(field: str) -> float:
    """GiB of this process's memory: VmRSS current, VmHWM peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 2**20  # kB


def memory(args: argparse.Namespace) -> dict:
    """Run ``memory-of`` in a process for each micro-batch."""
    found = {}
    for name, micro in (("one forward pass", args.batch), ("gradient caching", args.micro or args.batch // 16)):
        command = [sys.executable, __file__, "memory-of", "--llm", args.llm, "--batch", str(args.batch)]
        command += ["--micro", str(micro), "--longest", str(args.longest)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[f"{name}, micro-batch {micro}"] = json.loads(out.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "memory-of"))
    parser.add_argument("--llm", required=True)
    parser.add_argument("--batch", type=int, default=0, help="pairs; 64 for speed, 512 for memory")
    parser.add_argument("--micro", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--longest", type=int, default=90, help="words of the longest positive")
    args = parser.parse_args()
    args.batch = args.batch or (64 if args.what == "speed" else 512)
    if args.what == "memory":
        found = memory(args)
    else:
        start_ranks()
        with tempfile.TemporaryDirectory() as folder:
            found = speed(args, Path(folder)) if args.what == "speed" else memory_of(args, Path(folder))
    print(json.dumps({"threads": torch.get_num_threads(), **found} if args.what != "memory-of" else found))


if __name__ == "__main__":
    main()
