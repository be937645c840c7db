"""Stage 1 against sentence-transformers, with the same LLM.

    OMP_NUM_THREADS=1 python -m benchmarks.sentence_transformers [--llm PATH] --batch 32 --micro 8

CachedMultipleNegativesRankingLoss in both directions on a mean-pooled causal LLM with LoRA, and the step of ``llm2clip
finetune-llm``. Both tokenize in the step, cache gradients over micro-batches of one size, and begin with equal
adapters, so that their first losses must agree; memory is that of a step above the model's, in a new process.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import alternate, in_new_process, parser, peak_growth, print_table
from llm2clip_plugin.stages.llm import trained_module
from llm2clip_plugin.stages.settings import FinetuneConfig
from llm2clip_plugin.text.config import ContrastConfig, EncoderConfig, LoraSettings, PairsConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.pairs import CaptionStep, PairBatches, PairTokenizer, caption_terms
from llm2clip_plugin.train.config import OptimConfig
from llm2clip_plugin.train.engine import Engine, start_ranks

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}  # LoraSettings' defaults
WORDS = "a red bicycle leans against the brick wall of an old house near two sleeping dogs in the evening rain".split()
CONTRAST, OPTIM = ContrastConfig(mask_same=False), OptimConfig(lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
Step = Callable[[dict[str, Any]], float]


def theirs(args: argparse.Namespace) -> Step:
    """sentence-transformers' loss in a bare loop: forward, backward, AdamW."""
    from peft import LoraConfig, get_peft_model
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer: Any = Transformer(args.llm)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    torch.manual_seed(0)
    transformer.model = get_peft_model(transformer.model, LoraConfig(**LORA))
    model = SentenceTransformer(modules=[transformer, pooling])
    how: Any = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    loss_of = CachedMultipleNegativesRankingLoss(model, scale=CONTRAST.scale, mini_batch_size=args.micro, **how)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    model.train()

    def step(batch: dict[str, Any]) -> float:
        texts = [pair.query for pair in batch["pairs"]], [pair.positive for pair in batch["pairs"]]
        tokens = [model.tokenizer(side, padding=True, return_tensors="pt") for side in texts]  # no chat template
        loss = loss_of([dict(side.to(model.device)) for side in tokens], None)
        loss.backward()
        adam.step()
        adam.zero_grad()
        return loss.item()

    return step


def ours(args: argparse.Namespace) -> Step:
    """The package's step with DeepSpeed's engine, as stage 1 assembles it."""
    torch.manual_seed(0)
    read = EncoderConfig(llm=args.llm, compute_dtype="float32", attention="causal", pooling="mean")
    encoder = CaptionEncoder(read, trainable_adapter=True)
    module = trained_module(encoder, FinetuneConfig(encoder=read, lora=LoraSettings(dropout=0.0), contrast=CONTRAST))
    batch = {"train_batch_size": args.batch, "train_micro_batch_size_per_gpu": args.micro}
    ds_config = {**batch, "zero_optimization": {"stage": 0}, "steps_per_print": 1 << 31}
    groups = [{"params": [p for p in module.parameters() if p.requires_grad]}]
    engine = Engine(module, groups, OPTIM, ds_config, keep_frozen=False)
    step = CaptionStep(engine, caption_terms(CONTRAST), encoder, CONTRAST, seed=0)
    tokenize = PairTokenizer(encoder.tokenizer, encoder.config)
    return lambda batch: step({**batch, "tokens": tokenize(batch["pairs"])})[0]


STEPS: dict[str, Callable[[argparse.Namespace], Step]] = {"sentence-transformers": theirs, "llm2clip": ours}


def make_batch(args: argparse.Namespace) -> dict[str, Any]:
    """Short queries (4 to 12 words) and positives of mixed length, a third of them long."""
    rng, rows = random.Random(0), []
    for i in range(args.batch):
        words = [*rng.choices(WORDS, k=rng.randint(4, 12)), str(i)]
        more = rng.choices(WORDS, k=rng.randint(45, 90) if i % 3 == 0 else rng.randint(4, 15))
        rows.append({"query": " ".join(words), "positive": " ".join(words[-4:] + more)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        pairs = PairsConfig(data=(str(path),))
        return PairBatches(pairs, seed=0, global_batch=args.batch, rank=0, world=1).batch(0)


def memory_of(args: argparse.Namespace, way: str) -> float:
    """MiB that the second step of a way needs above the memory before it."""
    start_ranks()
    step, batch = STEPS[way](args), make_batch(args)
    step(batch)
    return peak_growth(lambda: step(batch))[0] / 2**20


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--llm", default="quickstart-output/models/gemma-3-270m", help="default: the quickstart's")
    options.add_argument("--batch", type=int, default=64, help="pairs a step")
    options.add_argument("--micro", type=int, default=16, help="pairs a micro-batch")
    args = options.parse_args()
    memory = {way: f"{in_new_process(memory_of, args, way):.0f}" for way in STEPS}
    start_ranks()  # not before: the processes above would find its port taken
    steps, batch = {way: make(args) for way, make in STEPS.items()}, make_batch(args)
    first = {way: step(batch) for way, step in steps.items()}
    if abs(first["llm2clip"] - first["sentence-transformers"]) > 1e-3:
        raise SystemExit(f"the first losses differ: {first}")
    runs = alternate({way: lambda step=step: step(batch) for way, step in steps.items()}, args.rounds)
    about = f"stage 1, batch {args.batch}, micro-batch {args.micro}, first losses {first['llm2clip']:.5f}"
    print_table(about, runs, amount=args.batch, unit="pairs", **{"MiB of a step": memory})


if __name__ == "__main__":
    main()
