"""``llm2clip train-text-adapter ... --dry-run``: what a run does and costs, from shapes alone; no weights are read."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.stages import plan as plans
from llm2clip_plugin.stages.run import find_cache, plan_engine
from llm2clip_plugin.stages.settings import rank_and_world
from llm2clip_plugin.stages.text_adapter.config import AdapterConfig
from llm2clip_plugin.stages.text_adapter.opening import find_clip_cache, open_data
from llm2clip_plugin.stages.text_adapter.run import adapter_parameters
from llm2clip_plugin.text.teacher import InheritedSpace
from llm2clip_plugin.train.memory import DTYPES, StepMemory, activation_bytes
from llm2clip_plugin.train.optim import chosen_optimizer
from llm2clip_plugin.vision.dual import TextAdapter

CAPTIONS = 16  # of the pass that measures activations


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of the data, widths of both spaces, and what of this is assumed."""

    samples: int
    llm_width: int
    clip_width: int
    assumed: tuple[str, ...]


def adapter_plan(config: AdapterConfig) -> str:
    """The plan as text.

    Raises ValueError, FileNotFoundError or ContractError for what would stop the run itself.
    """
    _, world = rank_and_world()
    size = measure_data(config)
    module = shaped(config, size)
    train, gpu_gib = config.train, config.plan.gpu_gib
    plan, deepspeed = plan_engine(
        config, train, config.optim, samples=size.samples, world=world, hidden_size=size.llm_width
    )
    parameters = plans.describe_parameters(adapter_parameters(module, config.optim), config.optim)
    memory = step_memory(config, module, size)
    shape = config.adapter
    blocks = f", {shape.blocks} blocks" if shape.kind == "mlp" else ""
    parts = [
        *(f"assumed: {line}" for line in size.assumed),
        f"text adapter: {shape.kind}{blocks}, from an LLM's {size.llm_width} to a CLIP's {size.clip_width}",
        plans.describe_run(plan, deepspeed, samples=size.samples, world=world),
        parameters,
        plans.describe_rank(memory, plan, deepspeed, world=world, gpu_gib=gpu_gib),
        f"activations of a caption: {memory.pair_bytes / 1e6:.2f} MB",
        plans.describe_columns(plans.columns(memory, train, gpu_gib), train.global_batch, gpu_gib),
        plans.describe_deepspeed(deepspeed),
    ]
    return "\n".join(parts)


def measure_data(config: AdapterConfig) -> Size:
    """Size of the data and widths of its caches; what is missing is assumed."""
    assumed = []
    if config.data.path and _has_caches(config):
        data = open_data(config)
        first = data.training[0]
        clip_width, samples = first.clip_cache.width, data.samples
        own = card_width(config.start)
        if own and own != clip_width:
            raise ValueError(
                f"{config.start} has image features of width {own}, but the text features of {data.clip.llm} have "
                f"{clip_width}; embed the captions with the text tower of the same CLIP"
            )
        return Size(samples=samples, llm_width=first.cache.width, clip_width=clip_width, assumed=())
    plan = config.plan
    samples, own = plan.samples, card_width(config.start)
    if config.data.path:
        samples = sum(len(open_source(source)) for source in config.data.sources)
        assumed.append("the LLM's and the CLIP's caches match the data (at least one is missing)")
    else:
        assumed.append(f"{samples:,} captioned images (--assumed-samples, or DATA)")
    assumed.append(f"LLM embeddings of width {plan.llm_width} (--plan.llm-width)")
    if not own:
        assumed.append(f"CLIP features of width {plan.clip_width} (--plan.clip-width, or --tower)")
    return Size(samples=samples, llm_width=plan.llm_width, clip_width=own or plan.clip_width, assumed=tuple(assumed))


def _has_caches(config: AdapterConfig) -> bool:
    """Whether the configuration names the caches, or there is one of each kind next to each path."""
    try:
        own = bool(config.data.cache) or all(map(find_cache, config.data.sources))
        return own and (bool(config.data.clip_cache) or all(map(find_clip_cache, config.data.sources)))
    except FileNotFoundError:
        return False


def card_width(tower: str) -> int:
    """The width of a tower directory's projection; 0 without a directory, or a tower alone."""
    card = Path(tower) / TowerCard.FILE
    return TowerCard.read(card).projection_dim if tower and card.is_file() else 0


def shaped(config: AdapterConfig, size: Size) -> InheritedSpace:
    """The adapter without values."""
    shape = config.adapter
    with torch.device("meta"):
        adapter = TextAdapter(
            size.llm_width,
            size.clip_width,
            blocks=shape.blocks,
            expansion=shape.expansion,
            kind=shape.kind,
            input_scale=shape.input_scale,
        )
    return InheritedSpace(adapter)


def step_memory(config: AdapterConfig, module: InheritedSpace, size: Size) -> StepMemory:
    """Measured on fake tensors; ``module``, on the meta device, is left with those."""
    count = sum(parameter.numel() for parameter in module.parameters())

    def make_inputs() -> tuple[Tensor]:
        return (torch.empty(CAPTIONS, size.llm_width),)

    pass_bytes = activation_bytes(
        module.to(DTYPES[config.train.precision]), make_inputs, lambda rows: module(rows).sum()
    )
    return StepMemory(
        precision=config.train.precision,
        trained=count,
        frozen_bytes=0.0,
        parameters=count,
        pair_bytes=pass_bytes / CAPTIONS,
        width=size.clip_width,
        state_bytes=chosen_optimizer(config.optim).state_bytes,
    )
