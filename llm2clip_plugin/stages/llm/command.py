"""The command line of stage 1: ``llm2clip finetune-llm``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llm2clip_plugin.files import started_by
from llm2clip_plugin.stages import plan as plans
from llm2clip_plugin.stages.llm.config import FINETUNE_LLM, FinetuneConfig
from llm2clip_plugin.stages.llm.run import finetune_llm, open_data, plan_stage, trained_parameters
from llm2clip_plugin.stages.settings import plan_or_train, rank_and_world
from llm2clip_plugin.text.adapter import autocast_adapter
from llm2clip_plugin.text.config import EncoderConfig, apply_card, apply_preset, find_card
from llm2clip_plugin.text.contrast import PairModule, equal_parts
from llm2clip_plugin.text.llm import CaptionModel, LlmShape, llm_config, shape_llm
from llm2clip_plugin.text.pairs import Pair
from llm2clip_plugin.text.tokens import literal_template, query_frames, token_ids
from llm2clip_plugin.train.memory import StepMemory, activation_bytes
from llm2clip_plugin.train.model import enable_gradient_checkpointing
from llm2clip_plugin.train.optim import chosen_optimizer

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
