"""The command line of stage 2: ``llm2clip train-tower``; under a launcher, scripts/train_tower.py.

A recipe or a file gives the full configuration, options override fields. Options of Hugging Face's Trainer and of
LLaVA's scripts keep their names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from llm2clip_plugin.data.sources.base import open_source
from llm2clip_plugin.data.workers import lacks_shared_memory
from llm2clip_plugin.files import started_by
from llm2clip_plugin.stages import run as plans
from llm2clip_plugin.stages.run import find_cache, plan_engine
from llm2clip_plugin.stages.settings import TEACHERS, plan_or_train, rank_and_world
from llm2clip_plugin.stages.tower_config import DEFAULT, TRAIN_TOWER, RunConfig
from llm2clip_plugin.stages.tower_run import check_data, check_patch_layers, load_plans, open_data, train_tower
from llm2clip_plugin.train.config import local_world_size
from llm2clip_plugin.train.losses.base import needs_reference, patch_layers
from llm2clip_plugin.train.model import (
    DTYPES,
    StepMemory,
    activation_bytes,
    enable_gradient_checkpointing,
    shape_dual,
    trained_parameters,
    with_llm_width,
)
from llm2clip_plugin.train.optim import chosen_optimizer
from llm2clip_plugin.vision.dual import DualEncoder

ASSUMED_WIDTH = TEACHERS["llama-8b"].width  # of an embedding, while the LLM is unknown
IMAGES = 16  # of the pass that measures activations


def main(argv: list[str]) -> int:
    """Print the plan or train; exit status 0."""
    config = TRAIN_TOWER.parse(argv)
    config.validate(needs_data=not config.dry_run)
    if rank_and_world()[0] == 0 and not any(word.startswith(("--recipe", "--config")) for word in argv):
        print(f"recipe: {DEFAULT} (the paper's settings for any data and tower; --recipe NAME chooses another)")
    return plan_or_train(
        config.dry_run,
        lambda: tower_plan(config),
        lambda: train_tower(config, command=started_by("train-tower", argv)),
        "tower",
    )


def tower_plan(config: RunConfig) -> str:
    """The plan as text.

    Raises ValueError, FileNotFoundError or ContractError for what would stop the run itself.
    """
    _, world = rank_and_world()
    size = measure_data(config)
    config = dataclasses.replace(config, dual=with_llm_width(config.dual, size.width))
    dual = shape_dual(config.tower, config.dual)
    check_patch_layers(dual, config.loss)
    train, heads, gpu_gib, tower = config.train, config.heads, config.plan.gpu_gib, dual.tower.config
    plan, deepspeed = plan_engine(
        config, train, config.optim, samples=size.samples, world=world, hidden_size=tower.hidden_size
    )
    parameters = plans.describe_parameters(trained_parameters(dual, config.optim), config.optim)
    memory = step_memory(config, dual)
    lacking = lacks_shared_memory(load_plans(config, tower.image_size, size.width, world), local_world_size())
    parts = [
        *(f"assumed: {line}" for line in size.assumed),
        f"tower: {config.tower.path or config.tower.architecture}, {tower.image_size} px, {tower.num_hidden_layers} "
        f"blocks x {tower.hidden_size}, {sum(p.numel() for p in dual.tower.parameters()):,} parameters; projection_dim "
        f"{config.dual.projection_dim}, LLM embeddings {size.width} wide",
        *([f"heads first: {heads.steps} steps of {heads.batch} pairs ({heads.target})"] if heads.steps else []),
        plans.describe_run(plan, deepspeed, samples=size.samples, world=world),
        parameters,
        plans.describe_rank(memory, plan, deepspeed, world=world, gpu_gib=gpu_gib),
        plans.describe_columns(plans.columns(memory, train, gpu_gib), train.global_batch, gpu_gib),
        *([f"too many loader processes for this machine: {lacking}"] if lacking else []),
    ]
    return "\n".join(parts)


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Size of the data and width of the teacher's embeddings."""

    samples: int
    width: int
    assumed: tuple[str, ...]


def measure_data(config: RunConfig) -> DataSize:
    """Size of the data and its caches; what is missing is assumed."""
    config.validate(needs_data=False)
    if config.data.path and _has_caches(config):
        data = open_data(config)
        check_data(config, data)
        return DataSize(samples=data.samples, width=data.caches[0].width, assumed=())
    samples, assumed = config.plan.images, ["an embedding cache that fits the data"]
    if config.data.path:
        samples = sum(len(open_source(source)) for source in config.data.sources)
    else:
        assumed = [f"{samples:,} images (--assumed-samples, or DATA)"]
    width = config.dual.llm_width or ASSUMED_WIDTH
    if not config.dual.llm_width:
        known = ", ".join(f"{teacher.width} for {name}" for name, teacher in TEACHERS.items())
        assumed.append(f"LLM embeddings of width {width} (--dual.llm-width: {known})")
    return DataSize(samples=samples, width=width, assumed=tuple(assumed))


def _has_caches(config: RunConfig) -> bool:
    """Whether the configuration names the caches, or there is one next to each path."""
    try:
        return bool(config.data.cache) or all(map(find_cache, config.data.sources))
    except FileNotFoundError:
        return False


def step_memory(config: RunConfig, dual: DualEncoder) -> StepMemory:
    """Measured on fake tensors; ``dual``, on the meta device, is left with those."""
    precision, train = config.train.precision, config.train
    counts = {flag: sum(p.numel() for p in dual.parameters() if p.requires_grad is flag) for flag in (True, False)}
    tower_parameters = sum(p.numel() for p in dual.tower.parameters())
    dtype, pixels = DTYPES[precision], (3, dual.tower.config.image_size, dual.tower.config.image_size)
    if train.gradient_checkpointing:
        enable_gradient_checkpointing(dual.tower)

    def make_inputs() -> tuple[Tensor, Tensor]:
        captions = (IMAGES, config.data.captions_per_image, config.dual.llm_width)
        return torch.empty(IMAGES, *pixels, dtype=dtype), torch.empty(captions)

    layers = patch_layers(config.loss)

    def forward(*inputs: Tensor) -> Tensor:
        return sum((feature.sum() for feature in dual(*inputs, **layers) if feature is not None), torch.zeros(()))

    of_patch = {"patches": 3 * dual.tower.config.hidden_size, "patch_features": 2 * config.dual.projection_dim}
    grid = dual.tower.config.image_size // dual.tower.config.patch_size
    return StepMemory(
        precision=precision,
        trained=counts[True],
        frozen_bytes=counts[False] * dtype.itemsize,
        parameters=sum(counts.values()),
        pair_bytes=activation_bytes(dual.to(dtype), make_inputs, forward) / IMAGES,
        width=config.dual.projection_dim,
        state_bytes=chosen_optimizer(config.optim).state_bytes,
        pixels=3 * dual.tower.config.image_size**2,
        averages=bool(config.train.ema_decay) + needs_reference(config.loss),
        frozen_tower_bytes=needs_reference(config.loss) * tower_parameters * dtype.itemsize,
        patches=grid**2 * sum(of_patch[reads] for reads in layers),
    )
