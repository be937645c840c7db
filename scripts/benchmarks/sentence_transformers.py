"""Stage 1 and embedding captions against sentence-transformers, with the same LLM in the same
dtype.

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.sentence_transformers [--llm PATH] --batch 32

Stage 1: CachedMultipleNegativesRankingLoss in both directions on a mean-pooled causal LLM with
LoRA, and the step of ``llm2clip finetune-llm``. Both tokenize in the step, cache gradients over
micro-batches of one size, and begin with equal adapters, so that their second losses must agree;
memory is that of a step above the model's, in a new process. Embedding: both ``encode`` with their
defaults, on the distinct short and long English captions of ``--concepts`` emoji drawn at random,
by the same tokens, mean-pooled as in stage 1 here.
"""

import random
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.stages.llm_config import FinetuneConfig
from llm2clip_plugin.text.config import ContrastConfig, EncoderConfig, LoraSettings
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.finetune import trained_module
from llm2clip_plugin.text.pair_batches import PairTokenizer
from llm2clip_plugin.text.pair_step import CaptionStep, caption_terms
from llm2clip_plugin.text.pairs import Pair
from llm2clip_plugin.train.config import OptimConfig
from llm2clip_plugin.train.engine import Engine, start_ranks
from scripts.benchmarks.common import alternate, alternate_processes, parse, print_table

# LoraSettings' defaults
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
WORDS = (
    "a red bicycle leans against the brick wall of an old house near two sleeping dogs in the "
    "evening rain"
).split()
# of the loss; bfloat16 has three digits, and the scale is 50
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
CONTRAST = ContrastConfig(mask_same=False)
OPTIM = OptimConfig(lr=1e-4, betas=(0.9, 0.999), eps=1e-8)


def make_pairs(count: int) -> list[Pair]:
    """Short queries (4 to 12 words) and positives of mixed length, a third of them long."""
    rng = random.Random(0)
    pairs = []
    for i in range(count):
        words = [*rng.choices(WORDS, k=rng.randint(4, 12)), str(i)]
        length = rng.randint(45, 90) if i % 3 == 0 else rng.randint(4, 15)
        more_words = rng.choices(WORDS, k=length)
        positive = " ".join(words[-4:] + more_words)
        pairs.append(Pair(str(i), " ".join(words), positive))
    return pairs


def their_model(args: Namespace, *, lora: bool) -> Any:
    """The causal LLM, mean-pooled."""
    from peft import LoraConfig, get_peft_model
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer: Any = Transformer(
        args.llm, model_kwargs={"dtype": getattr(torch, args.dtype)}
    )
    torch.manual_seed(0)
    if lora:
        transformer.model = get_peft_model(transformer.model, LoraConfig(**LORA))
    # its default: the last token
    mean = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, mean])


def emoji_captions(concepts: int) -> list[str]:
    """The distinct short and long English captions of so many emoji, drawn at random."""
    source = open_source(SourceConfig(path="llm2clip_plugin/data/emoji/train-noto.tar"))
    drawn = random.Random(0).sample(range(len(source)), min(concepts, len(source)))
    texts: dict[str, None] = {}  # keeps their order
    for number in drawn:
        _, captions = source.captions(number)
        for caption in captions:
            if caption.language == "en" and caption.kind in ("short", "long"):
                texts[caption.text] = None
    return list(texts)


def compare_embedding(args: Namespace) -> None:
    """Time both ``encode`` on emoji's captions, and print the table."""
    texts = emoji_captions(args.concepts)
    config = EncoderConfig(llm=args.llm, compute_dtype=args.dtype, attention="causal")
    encoder = CaptionEncoder(config)
    model = their_model(args, lora=False)
    rows = encoder.tokenize(texts)
    if rows != model.tokenizer(texts)["input_ids"]:
        raise SystemExit("sentence-transformers has other tokens")

    def their_encode() -> torch.Tensor:
        return model.encode(texts, convert_to_tensor=True).cpu().float()

    ways = {
        "sentence-transformers": their_encode,
        "llm2clip": partial(encoder.encode, texts),
    }
    runs = alternate(ways, args.rounds)
    last_embeddings = [runs_of_way[-1][1] for runs_of_way in runs.values()]
    cosine = cosine_similarity(*last_embeddings).min()
    tokens = sum(map(len, rows)) / len(rows)
    about = f"embedding, {args.dtype}, {tokens:.1f} tokens a caption, smallest cosine {cosine:.6f}"
    print_table(about, runs, amount=len(texts), unit="captions")


def their_step(args: Namespace) -> Callable[[], float]:
    """sentence-transformers' loss in a bare loop: forward, backward, AdamW."""
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
    )

    model = their_model(args, lora=True).train()
    pairs = make_pairs(args.batch)
    directions: Any = ("query_to_doc", "doc_to_query")
    loss_of = CachedMultipleNegativesRankingLoss(
        model,
        scale=CONTRAST.scale,
        mini_batch_size=args.micro,
        directions=directions,
        partition_mode="per_direction",
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    queries = [pair.query for pair in pairs]
    positives = [pair.positive for pair in pairs]

    def tokenize(texts: list[str]) -> dict[str, Any]:  # no chat template
        tokens = model.tokenizer(texts, padding=True, return_tensors="pt")
        return dict(tokens.to(model.device))

    def step() -> float:
        loss = loss_of([tokenize(queries), tokenize(positives)], None)
        loss.backward()
        adam.step()
        adam.zero_grad()
        return loss.item()

    step()  # the first one loads kernels and makes the optimizer's state
    return step


def our_step(args: Namespace) -> Callable[[], float]:
    """The package's step with DeepSpeed's engine, as stage 1 assembles it."""
    start_ranks()
    # and mean pooling, as theirs
    reading = EncoderConfig(llm=args.llm, compute_dtype=args.dtype, attention="causal")
    encoder = CaptionEncoder(reading, trainable_adapter=True)
    config = FinetuneConfig(
        encoder=encoder.config, lora=LoraSettings(dropout=0.0), contrast=CONTRAST
    )
    module = trained_module(encoder, config.lora, config.contrast, config.train)
    ds_config = {
        "train_batch_size": args.batch,
        "train_micro_batch_size_per_gpu": args.micro,
        "zero_optimization": {"stage": 0},
        "steps_per_print": 1 << 31,
    }
    groups = [{"params": [p for p in module.parameters() if p.requires_grad]}]
    engine = Engine(module, groups, OPTIM, ds_config, keep_frozen=False)
    train = CaptionStep(engine, caption_terms(CONTRAST), encoder, CONTRAST, seed=0)
    pairs = make_pairs(args.batch)
    tokenize = PairTokenizer(encoder.tokenizer, encoder.config)
    batch = {
        "caption_hashes": torch.arange(2 * args.batch).view(2, -1),
        "image_ids": torch.arange(args.batch),
        "keys": [pair.key for pair in pairs],
        "position": args.batch,
    }

    def step() -> float:
        loss, _ = train({**batch, "tokens": tokenize(pairs)})
        return loss

    step()
    return step


def compare_steps(args: Namespace) -> None:
    """Memory and time of a step of stage 1, and whether both compute the same."""
    makers = {"sentence-transformers": their_step, "llm2clip": our_step}
    _, memory = alternate_processes(makers, args, rounds=1)
    steps = {way: make(args) for way, make in makers.items()}
    second, other = (step() for step in steps.values())
    if abs(second - other) > TOLERANCE[args.dtype]:
        raise SystemExit(f"the losses of the second step differ: {second}, {other}")
    about = (
        f"stage 1, {args.dtype}, {args.batch} in {args.micro}s, "
        f"losses {second:.6f}, {other:.6f}"
    )
    runs = alternate(steps, args.rounds)
    columns = {"MiB of a step": memory}
    print_table(about, runs, amount=args.batch, unit="pairs", **columns)


if __name__ == "__main__":
    llm = (
        "quickstart-output/models/gemma-3-270m",
        "its folder; default: the quickstart's",
    )
    options: dict[str, Any] = {
        "batch": (64, "pairs a step"),
        "micro": (16, "pairs a micro-batch"),
        "concepts": (500, "emoji whose captions are embedded"),
        "part": ("all", "", "all", "stage1", "embed"),
        "dtype": ("float32", "of the LLM", *TOLERANCE),
    }
    args = parse(__doc__, llm=llm, **options)
    if args.part != "embed":
        compare_steps(args)
    if args.part != "stage1":
        compare_embedding(args)
