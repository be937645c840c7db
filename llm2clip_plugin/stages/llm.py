"""Stage 1 assembled: an LLM and pairs of captions in, a trained adapter out.

The loop, engine, checkpoints and loss are those of stage 2; what belongs to the LLM is in ``text``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llm2clip_plugin.console import phase
from llm2clip_plugin.contracts import EncoderCard
from llm2clip_plugin.data.cache import short_digest
from llm2clip_plugin.data.sampler import epoch_draws
from llm2clip_plugin.evaluate.captions import caption_sets, measure_captions
from llm2clip_plugin.files import started_by
from llm2clip_plugin.stages import run as plans
from llm2clip_plugin.stages.llm_config import FINETUNE_LLM, FinetuneConfig
from llm2clip_plugin.stages.run import TrainingRun, plan_engine, training_ranks
from llm2clip_plugin.stages.settings import plan_or_train, rank_and_world
from llm2clip_plugin.text.adapter import (
    adapter_folder,
    adapter_sha256,
    add_lora,
    autocast_adapter,
    merge_adapters,
    save_adapter,
)
from llm2clip_plugin.text.config import CARD_SETTINGS, EncoderConfig, apply_card, apply_preset, find_card
from llm2clip_plugin.text.contrast import CaptionStep, PairModule, caption_terms, equal_parts
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.llm import CaptionModel, LlmShape, llm_config, shape_llm
from llm2clip_plugin.text.pairs import Pair, PairBatches, PairTokenizer, Survey, open_pairs, survey, tokenized_batches
from llm2clip_plugin.text.tokens import literal_template, query_frames, token_ids
from llm2clip_plugin.train.checkpoint import TrainState, load, verify
from llm2clip_plugin.train.distributed import on_first_rank, rank, world_size
from llm2clip_plugin.train.errors import stop_requests
from llm2clip_plugin.train.guard import check_finite, locked
from llm2clip_plugin.train.loop import Evaluate
from llm2clip_plugin.train.model import StepMemory, activation_bytes, enable_gradient_checkpointing
from llm2clip_plugin.train.optim import EnginePlan, Trained, chosen_optimizer, is_vector, zero_stage
from llm2clip_plugin.vision.export import library_versions

ADAPTER = "adapter"


def finetune_llm(config: FinetuneConfig, command: dict[str, Any] | None = None) -> Path:
    """Train an adapter contrastively on captions; returns its folder.

    The same call resumes from the newest checkpoint of ``config.output_dir``. Raises ValueError, FileNotFoundError or
    ContractError for what the user can correct, NonFiniteLossError for a loss that is NaN or infinite. ``command``:
    see run_files.started_by; recorded in run.json.
    """
    with training_ranks(config.train) as device, locked(Path(config.output_dir)):
        return _train(config, device, command or {})


def _train(config: FinetuneConfig, device: torch.device, command: dict[str, Any]) -> Path:
    """From the data on: LLM, engine, loop, adapter."""
    with phase("opening the data"):
        data = open_data(config, rank(), world_size())
    run = dataclasses.replace(open_run(config, data), command=command)
    if rank() == 0:
        print("\n".join(data.lines()), flush=True)
    if config.evaluation.captions:
        on_first_rank(lambda: len(caption_sets(config.evaluation)))  # fails here rather than after the first steps
    resumed = run.find_checkpoint()
    encoder = CaptionEncoder(config.encoder, device, trainable_adapter=True)
    for result in data.surveys:
        line = count_truncated(result, encoder, cut_queries=config.pairs.cut_queries)
        if line and rank() == 0:
            print(line)
    terms, module = caption_terms(config.contrast), trained_module(encoder, config)
    if resumed is not None:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(resumed.weights[name])
    on_first_rank(lambda: check_finite(module, config.encoder.llm if resumed is None else resumed.path))
    trained = trained_parameters(module, config)
    engine = run.make_engine(module, trained, resumed, keep_frozen=False)
    start = run.start_state(resumed)
    evaluate = evaluation(encoder, config)
    with stop_requests() as stop:
        state = run.train_to_end(
            engine,
            start,
            step=CaptionStep(engine, terms, encoder, config.contrast, seed=config.train.seed),
            batches=tokenized_batches(
                data.batches, encoder, position=start.samples, workers=config.train.dataloader_num_workers
            ),
            evaluate=evaluate,
            before=evaluate if config.train.eval_on_start else None,
            stop=stop,
        )
    run.write_result(lambda: write_adapter(run, encoder, config, state))
    return run.folder / ADAPTER


def open_run(config: FinetuneConfig, data: Data) -> TrainingRun:
    """The run's DeepSpeed configuration and what its checkpoints are compared with.

    Raises FileNotFoundError for a start adapter that is missing.
    """
    plan, deepspeed = plan_stage(config, data.samples, world_size())
    starts = {f"start adapter {number}": adapter_sha256(path) for number, path in enumerate(start_folders(config), 1)}
    return TrainingRun(
        config=config,
        config_hash=config.hash,
        train=config.train,
        optim=config.optim,
        run_settings={**dataclasses.asdict(config), "samples": data.samples},
        teacher={},
        total_steps=plan.total_steps,
        deepspeed=deepspeed,
        data=data.digests | starts,
    )


def plan_stage(config: FinetuneConfig, samples: int, world: int) -> tuple[EnginePlan, dict[str, Any]]:
    """The run in DeepSpeed's terms. Raises ValueError for settings that exclude each other."""
    plan, deepspeed = plan_engine(config, config.train, config.optim, samples=samples, world=world, hidden_size=1024)
    if config.encoder.load_in_4bit and zero_stage(deepspeed) == 3:
        raise ValueError("ZeRO-3 cannot partition 4-bit weights; use scripts/zero2.json, or remove --load-in-4bit")
    if not config.train.has_steps:
        raise ValueError("num_train_epochs and max_steps are both 0: nothing to train")
    if config.train.ema_decay:
        raise ValueError(f"train.ema_decay is {config.train.ema_decay}, which adapters do not support; set it to 0")
    if config.start_adapters and (config.encoder.adapter or config.encoder.load_in_4bit or config.lora.dora):
        raise ValueError(
            f"start_adapters {' '.join(config.start_adapters)} are merged before a new LoRA is added: leave out "
            "--adapter, --load-in-4bit and --lora-dora, or pass no --start-adapters"
        )
    if any(path.endswith(".txt") for path in config.pairs.data) and not config.lora.dropout:
        raise ValueError("a text paired with itself differs only by dropout, but lora.dropout is 0; set it to 0.1")
    if config.train.precision != "fp32" and config.encoder.compute_dtype == "float32":
        raise ValueError(
            f"train.precision {config.train.precision} would convert the LLM's float32 weights; leave precision (the "
            "adapter's) at fp32 and set the LLM's dtype with --compute-dtype"
        )
    return plan, deepspeed


@dataclass(frozen=True, kw_only=True)
class Data:
    """The pairs of a run."""

    surveys: tuple[Survey, ...]  # one for each source
    samples: int  # pairs of an epoch
    batches: PairBatches  # of one rank

    @property
    def digests(self) -> dict[str, str]:
        """What is compared between ranks: the number of samples, and the texts of the first ones."""
        return {
            str(number): f"{len(source)} samples ({short_digest([[p.query, p.positive] for p in result.pairs])})"
            for number, (source, result) in enumerate(zip(self.batches.sources, self.surveys, strict=True), 1)
        }

    def lines(self) -> list[str]:
        """The surveys' findings."""
        return [line for result in self.surveys for line in result.lines()]


def open_data(config: FinetuneConfig, rank: int, world: int) -> Data:
    """Open and survey every data set. Raises FileNotFoundError or ValueError for one that is missing or too small."""
    sources = open_pairs(config.pairs)
    batches = PairBatches(
        sources,
        config.pairs.weights,
        seed=config.train.seed,
        global_batch=config.train.global_batch,
        rank=rank,
        world=world,
        mix_kinds=config.pairs.mix_kinds,
    )
    samples = sum(epoch_draws(list(map(len, sources)), config.pairs.weights or [1.0] * len(sources)))
    return Data(surveys=tuple(survey(source) for source in sources), samples=samples, batches=batches)


def count_truncated(result: Survey, encoder: CaptionEncoder, *, cut_queries: bool) -> str:
    """How many of a survey's queries will be truncated to max_tokens, as a line; "" if none.

    Raises ValueError if there are any, unless ``cut_queries``: a query's end is its caption, which would be lost.
    """
    limit = encoder.config.max_tokens
    frames = PairTokenizer(encoder).query_frames(result.pairs)
    queries = encoder.lengths([pair.query for pair in result.pairs], frames)
    long = [(length, pair.key) for length, pair in zip(queries, result.pairs, strict=True) if length > limit]
    if not long:
        return ""
    counted = f"{result.path}: {len(long)} of the first {len(queries)} queries are longer than max_tokens {limit}"
    if not cut_queries:
        length, key = max(long)
        raise ValueError(f"{counted}, the longest {length} (sample {key!r}); raise --max-tokens, or set --cut-queries")
    return f"{counted} and are truncated"


def trained_module(encoder: CaptionEncoder, config: FinetuneConfig) -> PairModule:
    """The encoder's LLM with an adapter, which alone trains."""
    if not config.encoder.adapter:
        llm = merge_adapters(encoder.model.llm, start_folders(config))  # type: ignore[arg-type]
        torch.manual_seed(config.train.seed)
        encoder.model.llm = add_lora(llm, config.lora, base=config.encoder.llm)
    if config.train.precision == "fp32":  # otherwise DeepSpeed converts the adapter
        encoder.model.autocast = autocast_adapter(encoder.model.llm, encoder.dtype)
    if config.train.gradient_checkpointing:
        enable_gradient_checkpointing(encoder.model.llm)
    return PairModule(encoder.model, config.contrast).train()


def start_folders(config: FinetuneConfig) -> list[Path]:
    """The folders of the adapters that training starts from, downloaded unless they are cached."""
    return [adapter_folder(name) for name in config.start_adapters]


def trained_parameters(module: torch.nn.Module, config: FinetuneConfig) -> list[Trained]:
    """Every parameter that trains, all at the same learning rate; vectors don't decay."""
    return [
        Trained(name=name, parameter=parameter, lr=config.optim.lr, decay=not is_vector(parameter))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]


def evaluation(encoder: CaptionEncoder, config: FinetuneConfig) -> Evaluate | None:
    """Caption retrieval accuracy on the held-out captions; None without any."""
    if not config.evaluation.captions:
        return None

    def evaluate() -> dict[str, float]:
        encoder.model.eval()
        scores = measure_captions(encoder, config.evaluation)
        encoder.model.train()
        return {row.name: row.cra for row in scores}

    return evaluate


def write_adapter(run: TrainingRun, encoder: CaptionEncoder, config: FinetuneConfig, state: TrainState) -> None:
    """Write the last checkpoint's adapter with its card."""
    last = run.checkpoints.path(state.step)  # the loop ends with a checkpoint
    verify(last, moments=False)
    prefix = "model.llm."
    trained = {n.removeprefix(prefix): t for n, t in load(last, moments=False).weights.items() if n.startswith(prefix)}
    card, starts = card_of(encoder, config, state), start_folders(config)
    save_adapter(encoder.model.llm, trained, card, run.folder / ADAPTER, starts=starts, replace=True)


def card_of(encoder: CaptionEncoder, config: FinetuneConfig, state: TrainState) -> EncoderCard:
    """How the adapter embeds, and how it was trained."""
    identity = encoder.identity()
    return EncoderCard(
        base=config.encoder.llm,
        base_sha256=identity.weights_sha256,
        **{name: vars(encoder.config)[name] for name in CARD_SETTINGS},
        training={
            "steps": state.step,
            "samples": state.samples,
            "global_batch": config.train.global_batch,
            "data": [Path(path).name for path in config.pairs.data],
            "pair_kinds": list(config.pairs.pair_kinds),
            "instructions": list(config.pairs.instructions),
            "start_adapters": [Path(path).name for path in config.start_adapters],
            "scale": config.contrast.scale,
            "symmetric": config.contrast.symmetric,
            "quantization": identity.quantization,
            "config_hash": config.hash,
        },
        metrics=state.metrics,
        versions=library_versions(),
    )


# The command line of stage 1: ``llm2clip finetune-llm``.

ASSUMED_TOKENS = 64  # of a text, template and prompt included
TEXTS = 64  # of the passes that measure activations


def main(argv: list[str]) -> int:
    """``llm2clip finetune-llm DATA [DATA ...] --llm PATH_OR_HUB_ID [options]``."""
    config = FINETUNE_LLM.parse(argv)
    return plan_or_train(
        config.dry_run,
        lambda: llm_plan(config),
        lambda: finetune_llm(config, started_by("finetune-llm", argv)),
        "adapter",
    )


def llm_plan(config: FinetuneConfig) -> str:
    """The plan as text.

    Raises ValueError, FileNotFoundError or ContractError for what would stop the run itself; memory is left out for an
    LLM without a config.json.
    """
    _, world = rank_and_world()
    encoder = apply_preset(config.encoder)
    encoder = apply_card(encoder, find_card(encoder.adapter or encoder.llm), encoder.adapter or encoder.llm)
    config = dataclasses.replace(config, encoder=encoder)
    size = measure_data(config)
    plan, deepspeed = plan_stage(config, size.pairs, world)
    parts = [
        *size.found,
        *(f"assumed: {line}" for line in size.assumed),
        plans.describe_run(plan, deepspeed, samples=size.pairs, world=world),
    ]
    try:
        settings = llm_config(encoder)
    except FileNotFoundError as error:
        parts.append(f"memory is not planned: {error}")
    else:
        longest, gpu_gib, train = encoder.max_tokens, config.plan.gpu_gib, config.train
        shape = shape_llm(settings, encoder, config.lora, train.precision)
        usual, long = (step_memory(config, settings, size, lengths, shape) for lengths in (size.lengths, (longest,)))
        stages = (0, 1, 2) if encoder.load_in_4bit else (0, 1, 2, 3)  # ZeRO-3 can't partition 4-bit weights
        parts += [
            describe_llm(config, shape),
            plans.describe_rank(usual, plan, deepspeed, world=world, gpu_gib=gpu_gib),
        ]
        for memory, tokens in (
            (usual, f"{size.tokens:.4g} tokens (the mean)"),
            (long, f"{longest} tokens (max_tokens)"),
        ):
            table = plans.columns(memory, train, gpu_gib, stages=stages)
            about = f", for pairs of {size.texts} texts of {tokens}"
            parts.append(plans.describe_columns(table, train.global_batch, gpu_gib, about))
    return "\n".join(parts)


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Size of the data and length of its texts."""

    pairs: int
    texts: int  # of a pair: query and positive, and a hard negative if the data has them
    lengths: tuple[int, ...]  # tokens of texts, truncated to max_tokens
    found: tuple[str, ...]  # what the surveys of the data say
    assumed: tuple[str, ...]

    @property
    def tokens(self) -> float:
        """Of a text, on average."""
        return sum(self.lengths) / len(self.lengths)


def measure_data(config: FinetuneConfig) -> DataSize:
    """Size of the data and length of its texts; what is missing is assumed."""
    encoder, assumed = config.encoder, []
    if encoder.adapter:
        assumed.append(f"{encoder.adapter} has rank {config.lora.r} (--lora-rank), on the layers below")
    if config.pairs.data:
        data = open_data(config, rank=0, world=1)
        pairs = [pair for survey in data.surveys for pair in survey.pairs]
        negatives = config.pairs.random_negatives or any(pair.negative for pair in pairs)
        samples, texts, found = data.samples, 3 if negatives else 2, data.lines()
        lengths, missing = token_counts(encoder, pairs), "the LLM's tokenizer is not on this machine"
    else:
        texts = 3 if config.pairs.random_negatives else 2
        samples, found = config.plan.images, []
        lengths, missing = [], "no DATA"
        assumed.append(f"{samples:,} pairs of a query and a positive (--assumed-samples, or DATA)")
    if not lengths:
        lengths = [min(ASSUMED_TOKENS, encoder.max_tokens)]
        assumed.append(f"{lengths[0]} tokens per text, template and prompt included: {missing}")
    return DataSize(pairs=samples, texts=texts, lengths=tuple(lengths), found=tuple(found), assumed=tuple(assumed))


def token_counts(encoder: EncoderConfig, pairs: Sequence[Pair]) -> list[int]:
    """Tokens of each text, truncated to max_tokens; [] without a tokenizer in the folder or the local Hub cache."""
    from transformers import AutoTokenizer

    if not encoder.llm:
        return []
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            encoder.llm, revision=encoder.revision or "main", local_files_only=True
        )
    except (OSError, ValueError):
        return []
    template = literal_template(tokenizer, encoder.chat_template)
    framed = [(encoder.query_prompt if pair.instruction is None else pair.instruction, pair.query) for pair in pairs]
    framed += [(encoder.prompt, text) for pair in pairs for text in (pair.positive, pair.negative) if text]
    prompts, texts = zip(*framed, strict=True)
    frames = query_frames(tokenizer, template, prompts)
    counts = zip(frames, token_ids(tokenizer, frames, texts), strict=True)
    return [frame.size + min(len(ids), frame.caption_budget(encoder.max_tokens)) for frame, ids in counts]


def step_memory(
    config: FinetuneConfig,
    settings: PretrainedConfig,
    size: DataSize,
    lengths: Sequence[int],
    shape: LlmShape | None = None,
) -> StepMemory:
    """Measured on fake tensors with texts of these lengths, on a few blocks: memory grows linearly with blocks.

    ``shape``: of all blocks, if it is known.
    """

    def shaped(blocks: int) -> LlmShape:
        return shape_llm(settings, config.encoder, config.lora, config.train.precision, last_blocks=blocks)

    shape = shape or shaped(0)
    few, more = min(1, shape.blocks), min(2, shape.blocks)
    text_bytes = texts_bytes(config, shaped(more), lengths)
    if more > few:
        slope = (text_bytes - texts_bytes(config, shaped(few), lengths)) / (more - few)
        text_bytes += slope * (shape.blocks - more)
    return StepMemory(
        precision=config.train.precision,
        trained=sum(p.numel() for p in shape.llm.parameters() if p.requires_grad),
        frozen_bytes=shape.frozen_bytes,
        parameters=shape.parameters,
        pair_bytes=size.texts * text_bytes / TEXTS,
        width=shape.width,
        state_bytes=chosen_optimizer(config.optim).state_bytes,
    )


def texts_bytes(config: FinetuneConfig, shape: LlmShape, lengths: Sequence[int]) -> float:
    """Activations of TEXTS texts, their lengths spread over ``lengths``, in the step's groups of like length."""
    ordered = sorted(lengths)
    spread = [ordered[i * len(ordered) // TEXTS] for i in range(TEXTS)]
    model = CaptionModel(shape.llm, config.encoder.pooling)
    model.autocast = autocast_adapter(shape.llm, shape.dtype)
    module = PairModule(model, config.contrast).train()
    if config.train.gradient_checkpointing:
        enable_gradient_checkpointing(shape.llm)

    def make_inputs() -> list[Tensor]:
        tensors: list[Tensor] = []
        for group in equal_parts(spread, config.contrast.length_groups):
            tokens = torch.zeros(len(group), group[-1], dtype=torch.int64)
            tensors += [tokens, tokens, tokens, tokens.bool()]  # ids, attention mask, positions, pooling mask
        return tensors

    return activation_bytes(module, make_inputs, lambda *inputs: module(*inputs)[0].sum())


def describe_llm(config: FinetuneConfig, shape: LlmShape) -> str:
    """The LLM's frozen parameters and the adapter's."""
    lora = config.lora
    trained = trained_parameters(shape.llm, config)
    dtype = ("NF4 and " if config.encoder.load_in_4bit else "") + str(shape.dtype).removeprefix("torch.")
    starts = "".join(f"; {name} merged" for name in config.start_adapters)
    return (
        f"LLM: {config.encoder.llm}, {shape.kind}, {shape.blocks} blocks x {shape.width}, {shape.parameters:,} "
        f"parameters without a head, {shape.frozen_bytes / plans.GIB:.2f} GiB in {dtype}{starts}\n"
        f"LoRA: r {lora.r}, alpha {lora.alpha} on {', '.join(shape.adapted)}\n"
        + plans.describe_parameters(trained, config.optim)
    )
