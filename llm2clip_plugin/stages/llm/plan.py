"""``llm2clip finetune-llm ... --dry-run``: what a stage 1 run would do and cost, from shapes alone.

No weights are read, and nothing is downloaded but a config.json; where there is no data or no tokenizer, the plan says
what it assumes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from llm2clip_plugin.stages import plan_text as plans
from llm2clip_plugin.stages.command_line import rank_and_world
from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.stages.llm.opening import open_data
from llm2clip_plugin.stages.llm.run import plan_stage
from llm2clip_plugin.stages.paper import LLM_MIXTURE
from llm2clip_plugin.text.memory import LlmShape, kept_by_token, llm_config, model_of, shape_llm
from llm2clip_plugin.text.pairs import Pair
from llm2clip_plugin.text.settings import EncoderConfig, apply_card, apply_preset, find_card
from llm2clip_plugin.text.tokens import build_frame, literal_template, token_ids
from llm2clip_plugin.train.memory import Kept, Model
from llm2clip_plugin.train.optim import Trained, is_vector

ASSUMED_TOKENS = 64  # of a text, template and prompt with it


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Size of the data and length of its texts, with where they come from."""

    pairs: int
    texts: int  # of a pair: query and positive, and a hard negative where the data has them
    lengths: tuple[int, ...]  # tokens of texts, cut to max_tokens
    lines: tuple[str, ...]  # what the data showed
    notes: tuple[str, ...]  # what was assumed

    @property
    def tokens(self) -> float:
        """Of a text, on average."""
        return sum(self.lengths) / len(self.lengths)

    def at_once(self, groups: int) -> float:
        """Share of a micro-batch's tokens in its group of longest texts, where it is cut into groups of like length."""
        size = -(-len(self.lengths) // groups)
        return max(1 / groups, sum(sorted(self.lengths)[-size:]) / sum(self.lengths)) if size > 1 else 1 / groups


def llm_plan(config: FinetuneConfig, command: Sequence[str]) -> str:
    """The plan as text. ``command``: the options of the command line, repeated in the commands that it proposes.

    Raises ValueError, FileNotFoundError or ContractError for what would stop the run itself; an LLM that is not to be
    had leaves the memory out.
    """
    _, world = rank_and_world()
    encoder = apply_preset(config.encoder)
    encoder = apply_card(encoder, find_card(encoder.adapter or encoder.llm), encoder.adapter or encoder.llm)
    config = dataclasses.replace(config, encoder=encoder)
    numbers = look(config)
    plan, ds_config = plan_stage(config, numbers.pairs, world)
    parts = [
        *numbers.lines,
        *(f"assumed: {note}" for note in numbers.notes),
        plans.describe_run(plan, ds_config, samples=numbers.pairs, world=world),
    ]
    try:
        settings = llm_config(encoder)
    except FileNotFoundError as error:
        parts.append(f"memory is not planned: {error}")
    else:
        shape = shape_llm(settings, encoder, config.lora, config.train.precision)
        token = kept_by_token(settings, encoder, config.lora, config.train.precision)
        usual, longest = (model_at(config, numbers, shape, token, tokens) for tokens in (None, encoder.max_tokens))
        table = columns(config, usual)
        parts += [
            *describe_llm(config, shape),
            describe_texts(numbers, encoder.max_tokens, usual, longest),
            plans.describe_rank(
                usual,
                plan,
                ds_config,
                world=world,
                gpu_gib=config.plan.gpu_gib,
                unit=f"a pair of {numbers.texts} texts",
            ),
            describe_table(config, table, f"{numbers.tokens:.4g} tokens on average"),
            describe_table(config, columns(config, longest), f"{encoder.max_tokens} tokens, max_tokens, all"),
            commands(config, command, table),
        ]
    return "\n".join([*parts, plans.describe_deepspeed(ds_config)])


def pretraining_plan(config: FinetuneConfig) -> str:
    """What ``pretrain-llm`` would do: its pairs, steps and DeepSpeed configuration, without memory."""
    _, world = rank_and_world()
    data = open_data(config, rank=0, world=world)
    plan, ds_config = plan_stage(config, data.samples, world)
    described = plans.describe_run(plan, ds_config, samples=data.samples, world=world)
    return "\n".join([*data.lines(), described, plans.describe_deepspeed(ds_config)])


def look(config: FinetuneConfig) -> Numbers:
    """The data as it is; what is missing is assumed, and said."""
    encoder, lines, notes = config.encoder, [], []
    if encoder.adapter:
        notes.append(f"{encoder.adapter} has rank {config.lora.r} (--r), on the layers below")
    if config.pairs.data:
        opened = open_data(config, rank=0, world=1)
        pairs = [pair for found in opened.surveys for pair in found.pairs]
        samples, texts, lines = opened.samples, 3 if any(pair.negative for pair in pairs) else 2, opened.lines()
        lengths = token_counts(encoder, pairs)
        missing = "the LLM's tokenizer isn't here"
    else:
        samples, texts, lengths, missing = config.plan.assumed_pairs, 2, [], "no DATA"
        lines = [f"the paper's data: {LLM_MIXTURE}"]
        notes.append(f"{samples:,} pairs of a query and a positive (--plan.images, or DATA)")
    if not lengths:
        lengths = [min(ASSUMED_TOKENS, encoder.max_tokens)]
        notes.append(f"{lengths[0]} tokens a text, template and prompt with it: {missing}")
    return Numbers(pairs=samples, texts=texts, lengths=tuple(lengths), lines=tuple(lines), notes=tuple(notes))


def token_counts(encoder: EncoderConfig, pairs: Sequence[Pair]) -> list[int]:
    """Tokens of each text, cut to max_tokens; empty where no tokenizer is in a folder or in the Hub's cache."""
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
    sides = (
        (encoder.query_prompt, [pair.query for pair in pairs]),
        (encoder.prompt, [text for pair in pairs for text in (pair.positive, pair.negative) if text]),
    )
    counts = []
    for prompt, texts in sides:
        frame = build_frame(tokenizer, template, prompt)
        budget = frame.caption_budget(encoder.max_tokens)
        counts += [frame.size + min(len(ids), budget) for ids in token_ids(tokenizer, frame, texts)]
    return counts


def model_at(config: FinetuneConfig, numbers: Numbers, shape: LlmShape, token: Kept, tokens: int | None) -> Model:
    """What memory follows from, with texts as the data has them (``tokens`` None) or all of so many tokens."""
    groups = config.contrast.length_groups
    model = model_of(
        shape,
        token.times(numbers.texts * (tokens or numbers.tokens)),
        config.train.precision,
        checkpointing=config.train.gradient_checkpointing,
        at_once=1 / groups if tokens else numbers.at_once(groups),
    )
    return dataclasses.replace(model, state_bytes=config.optim.optimizer().state_bytes)


def columns(config: FinetuneConfig, model: Model) -> list[plans.Column]:
    """The run on 1, 8 and 64 GPUs; ZeRO-3 can't cut up 4-bit weights."""
    return plans.columns(
        model,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        gpu_gib=config.plan.gpu_gib,
        stages=(0, 1, 2) if config.encoder.load_in_4bit else (0, 1, 2, 3),
    )


def describe_llm(config: FinetuneConfig, shape: LlmShape) -> list[str]:
    """Parameters that rest and that train."""
    lora, train = config.lora, config.train
    trained = [
        Trained(name=name, parameter=p, lr=config.optim.lr, decay=not is_vector(p))
        for name, p in shape.llm.named_parameters()
        if p.requires_grad
    ]
    dtype = ("NF4 and " if config.encoder.load_in_4bit else "") + str(shape.dtype).removeprefix("torch.")
    checkpoint = (4 + config.optim.optimizer().state_bytes) * sum(item.parameter.numel() for item in trained) / 1e9
    return [
        f"LLM: {config.encoder.llm}, {shape.kind}, {shape.blocks} blocks x {shape.width}, {shape.parameters:,} "
        f"parameters without a head, {shape.frozen_bytes / plans.GIB:.2f} GiB in {dtype}",
        f"LoRA: r {lora.r}, alpha {lora.alpha} on {', '.join(shape.adapted)}",
        plans.describe_parameters(trained, config.optim.weight_decay),
        f"a checkpoint: {checkpoint:.2f} GB, kept: {train.save_total_limit or 'all'}",
    ]


def describe_texts(numbers: Numbers, max_tokens: int, usual: Model, longest: Model) -> str:
    """Activations of one text."""
    how = "with" if usual.checkpointing else "without"
    sizes = [model.peak / numbers.texts / 1e6 for model in (usual, longest)]
    return (
        f"activations of a text, {how} gradient checkpointing: {sizes[0]:,.1f} MB at {numbers.tokens:.4g} tokens (the "
        f"mean), {sizes[1]:,.1f} MB at {max_tokens} (max_tokens)"
    )


def describe_table(config: FinetuneConfig, table: list[plans.Column], length: str) -> str:
    """The table of GPUs by ZeRO stages for texts of that length."""
    return plans.describe_columns(table, config.train.global_batch, config.plan.gpu_gib, f"; texts of {length}")


def commands(config: FinetuneConfig, command: Sequence[str], table: list[plans.Column]) -> str:
    """The run on 1, 8 and 64 GPUs."""
    words = [word for word in command if word not in ("--dry-run", "--dry_run")]
    words = words if config.pairs.data else ["DATA", *words]
    if not config.deepspeed:
        words += ["--deepspeed", "scripts/zero2.json"]
    batches = (config.train.global_batch, config.train.micro_batch)
    return plans.describe_commands("scripts/finetune_llm.py", words, table, batches, option="--micro-batch")
