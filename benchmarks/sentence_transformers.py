"""Stage 1 and embedding captions against sentence-transformers, with the same LLM.

    OMP_NUM_THREADS=1 python -m benchmarks.sentence_transformers [--llm PATH] --batch 32 --micro 8

Stage 1: CachedMultipleNegativesRankingLoss in both directions on a mean-pooled causal LLM with LoRA, and the step of
``llm2clip finetune-llm``. Both tokenize in the step, cache gradients over micro-batches of one size, and begin with
equal adapters, so that their first losses must agree; memory is that of a step above the model's, in a new process.
Embedding: its ``encode`` against that of ``llm2clip embed``, on captions of mixed length.
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import (
    WORDS,
    alternate,
    in_new_process,
    parser,
    peak_growth,
    print_table,
    random_llama,
    write_lines,
)
from llm2clip_plugin.stages.llm import trained_module
from llm2clip_plugin.stages.settings import FinetuneConfig
from llm2clip_plugin.text.config import ContrastConfig, EncoderConfig, LoraSettings, PairsConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.pairs import CaptionStep, PairBatches, PairTokenizer, caption_terms
from llm2clip_plugin.train.config import OptimConfig
from llm2clip_plugin.train.engine import Engine, start_ranks

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}  # LoraSettings' defaults
CONTRAST, OPTIM = ContrastConfig(mask_same=False), OptimConfig(lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
Step = Callable[[dict[str, Any]], float]


def encoder_config(llm: str) -> EncoderConfig:
    """Attention and pooling as sentence-transformers gives them to a decoder LLM here."""
    return EncoderConfig(llm=llm, compute_dtype="float32", attention="causal", pooling="mean")


def their_model(llm: str, *, lora: bool) -> Any:
    """A mean-pooled causal LLM."""
    from peft import LoraConfig, get_peft_model
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer: Any = Transformer(llm)
    width = transformer.get_embedding_dimension()
    torch.manual_seed(0)
    if lora:
        transformer.model = get_peft_model(transformer.model, LoraConfig(**LORA))
    return SentenceTransformer(modules=[transformer, Pooling(width, pooling_mode="mean")])


def theirs(args: argparse.Namespace) -> Step:
    """sentence-transformers' loss in a bare loop: forward, backward, AdamW."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model = their_model(args.llm, lora=True)
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
    encoder = CaptionEncoder(encoder_config(args.llm), trainable_adapter=True)
    config = FinetuneConfig(encoder=encoder_config(args.llm), lora=LoraSettings(dropout=0.0), contrast=CONTRAST)
    module = trained_module(encoder, config)
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
        path = write_lines(Path(folder) / "pairs.jsonl", rows)
        pairs = PairsConfig(data=(str(path),))
        return PairBatches(pairs, seed=0, global_batch=args.batch, rank=0, world=1).batch(0)


def memory_of(args: argparse.Namespace, way: str) -> float:
    """MiB that the second step of a way needs above the memory before it."""
    start_ranks()
    step, batch = STEPS[way](args), make_batch(args)
    step(batch)
    return peak_growth(lambda: step(batch))[0] / 2**20


def compare_steps(args: argparse.Namespace) -> None:
    """A step of stage 1: pairs per second and memory."""
    memory = {way: f"{in_new_process(memory_of, args, way):.0f}" for way in STEPS}
    start_ranks()  # not before: the processes above would find its port taken
    steps, batch = {way: make(args) for way, make in STEPS.items()}, make_batch(args)
    first = {way: step(batch) for way, step in steps.items()}
    if abs(first["llm2clip"] - first["sentence-transformers"]) > 1e-3:
        raise SystemExit(f"the first losses differ: {first}")
    runs = alternate({way: lambda step=step: step(batch) for way, step in steps.items()}, args.rounds)
    about = f"stage 1, batch {args.batch}, micro-batch {args.micro}, first losses {first['llm2clip']:.5f}"
    print_table(about, runs, amount=args.batch, unit="pairs", columns={"MiB of a step": memory})


def compare_embedding(args: argparse.Namespace) -> None:
    """Captions per second; half of the captions 4 to 16 words, half 40 to 160, in random order."""
    rng = random.Random(0)
    lengths = [rng.randint(4, 16) if i % 2 else rng.randint(40, 160) for i in range(args.captions)]
    rng.shuffle(lengths)
    captions = [" ".join(rng.choices(WORDS, k=length)) for length in lengths]
    model, encoder = their_model(args.llm, lora=False), CaptionEncoder(encoder_config(args.llm))
    ways = {
        "sentence-transformers": lambda: model.encode(captions, batch_size=32, convert_to_tensor=True).cpu(),
        "llm2clip": lambda: encoder.encode(captions),
    }
    runs = alternate(ways, args.rounds)
    cosine = float(F.cosine_similarity(*(of_way[-1].result.float() for of_way in runs.values())).min())
    print_table(f"embedding, smallest cosine {cosine:.6f}", runs, amount=args.captions, unit="captions")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--llm", default="", help="default: a random Llama of 8 blocks of 256")
    options.add_argument("--batch", type=int, default=64, help="pairs a step")
    options.add_argument("--micro", type=int, default=16, help="pairs a micro-batch")
    options.add_argument("--captions", type=int, default=256, help="to embed")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.llm = args.llm or str(random_llama(Path(folder) / "llm"))
        compare_steps(args)
        compare_embedding(args)


if __name__ == "__main__":
    main()
