#!/usr/bin/env python3
"""Stage 1 against sentence-transformers: pairs per second and peak memory with the same LLM, LoRA, batch and loss.

    scripts/bench_sentence_transformers.py --llm PATH [--batch 64] [--micro 16] [--rounds 5]

Theirs is CachedMultipleNegativesRankingLoss in both directions on a mean-pooled causal LLM, with AdamW; ours is the
step of ``llm2clip finetune-llm``. Both tokenize the batch's texts in the step, cache gradients over micro-batches of
the same size, and begin with equal adapters, so that their first losses must agree. Steps alternate in one process;
memory (above that of the model) is measured in a new process for each way. Prints JSON.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import alternate, argument_parser, in_new_process, median_seconds, peak_growth, speedups
from bench_finetune import OPTIM, Ours, batches, write_pairs

from llm2clip_plugin.text.config import ContrastConfig, EncoderConfig
from llm2clip_plugin.text.pairs import Pair
from llm2clip_plugin.train.engine import start_ranks

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}  # LoraSettings' defaults
CONTRAST = ContrastConfig(mask_same=False)
Step = Callable[[dict[str, Any]], float]


def ours(args: argparse.Namespace) -> Step:
    """The package's step, with the attention and pooling that sentence-transformers gives a decoder LLM here."""
    torch.manual_seed(0)
    encoding = EncoderConfig(llm=args.llm, compute_dtype="float32", attention="causal", pooling="mean")
    return Ours(args.llm, args.batch, args.micro, CONTRAST, encoding)


def theirs(args: argparse.Namespace) -> Step:
    """sentence-transformers' model and loss in a bare loop: forward, backward, AdamW."""
    from peft import LoraConfig, get_peft_model
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer: Any = Transformer(args.llm)
    width = transformer.get_embedding_dimension()
    torch.manual_seed(0)
    transformer.model = get_peft_model(transformer.model, LoraConfig(**LORA))
    model = SentenceTransformer(modules=[transformer, Pooling(width, pooling_mode="mean")])
    loss_of = CachedMultipleNegativesRankingLoss(
        model,
        scale=CONTRAST.scale,
        mini_batch_size=args.micro,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    model.train()

    def step(batch: dict[str, Any]) -> float:
        pairs: list[Pair] = batch["pairs"]
        texts = [pair.query for pair in pairs], [pair.positive for pair in pairs]
        tokens = [model.tokenizer(side, padding=True, return_tensors="pt") for side in texts]  # no chat template
        loss = loss_of([dict(side.to(model.device)) for side in tokens], None)
        loss.backward()
        adam.step()
        adam.zero_grad()
        return loss.item()

    return step


WAYS: dict[str, Callable[[argparse.Namespace], Step]] = {"sentence-transformers": theirs, "llm2clip": ours}


def memory_of(args: argparse.Namespace, way: str) -> float:
    """MiB that the second step of a way needs above the memory before it."""
    start_ranks()
    step = WAYS[way](args)
    with tempfile.TemporaryDirectory() as folder:
        batch = batch_of(Path(folder), args)
        step(batch)
        growth, _ = peak_growth(lambda: step(batch), cuda=torch.cuda.is_available())
    return growth / 2**20


def batch_of(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One batch of pairs, a third of the positives long."""
    return batches(write_pairs(folder / "pairs.jsonl", args.batch, args.longest), args.batch).batch(0)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--batch", type=int, default=64, help="pairs a step")
    parser.add_argument("--micro", type=int, default=16, help="pairs a micro-batch")
    parser.add_argument("--longest", type=int, default=90, help="words of the longest positive")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    memory = {way: round(in_new_process(memory_of, args, way), 1) for way in WAYS}
    start_ranks()
    steps = {way: make(args) for way, make in WAYS.items()}
    with tempfile.TemporaryDirectory() as folder:
        batch = batch_of(Path(folder), args)
        first = {way: step(batch) for way, step in steps.items()}
        runs = alternate({way: lambda step=step: step(batch) for way, step in steps.items()}, args.rounds)
    if abs(first["llm2clip"] - first["sentence-transformers"]) > 1e-3:
        raise SystemExit(f"the first losses differ: {first}")
    ratios = sorted(speedups(runs["llm2clip"], runs["sentence-transformers"]))
    result = {
        "threads": torch.get_num_threads(),
        "pairs_per_s": {way: round(args.batch / median_seconds(of_way), 2) for way, of_way in runs.items()},
        "times_faster": [round(value, 2) for value in (ratios[0], statistics.median(ratios), ratios[-1])],
        "first_loss": first,
        "step_memory_mib": memory,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
