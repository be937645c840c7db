"""``llm2clip train-tower ... --dry-run``: what a run would do and cost, from shapes alone.

No weights are read and nothing is downloaded; where there is no data or no cache yet, the plan says what it assumes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from llm2clip_plugin.data.cache.shard_file import shard_bytes
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.stages import plan_text as plans
from llm2clip_plugin.stages.command_line import rank_and_world
from llm2clip_plugin.stages.paper import TEACHERS, TOWER_MIXTURES
from llm2clip_plugin.stages.run_state import plan_engine
from llm2clip_plugin.stages.tower.config import RunConfig
from llm2clip_plugin.stages.tower.opening import find_cache, open_data
from llm2clip_plugin.train.memory import PROBE_GRID, model_of
from llm2clip_plugin.train.model import shape_dual, trained_parameters, with_llm_width

ASSUMED_WIDTH = 4096  # of an LLM that nothing is known of: the paper's 8B
KEY_BYTES = 9  # of a sample's key, as img2dataset makes them


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Size of the data and width of the teacher, with where they come from."""

    samples: int
    captions: int
    width: int  # of an LLM embedding
    notes: tuple[str, ...]  # what was assumed


def tower_plan(config: RunConfig, command: Sequence[str]) -> str:
    """The plan as text. ``command``: the options of the command line, repeated in the commands that it proposes.

    Raises ValueError, FileNotFoundError or ContractError for what would stop the run itself.
    """
    _, world = rank_and_world()
    numbers = look(config)
    config = dataclasses.replace(config, dual=with_llm_width(config.dual, numbers.width))
    dual = shape_dual(config.tower, config.dual)
    train, tower = config.train, dual.tower.config
    plan, ds_config = plan_engine(
        config, train, config.optim, samples=numbers.samples, world=world, hidden_size=tower.hidden_size
    )
    small = dataclasses.replace(config.tower, image_size=PROBE_GRID * tower.patch_size)
    model = model_of(
        dual, shape_dual(small, config.dual).tower, train.precision, checkpointing=train.gradient_checkpointing
    )
    model = dataclasses.replace(model, state_bytes=config.optim.optimizer().state_bytes)
    checkpoint = (4 + model.state_bytes) * model.trained
    table = plans.columns(
        model, global_batch=train.global_batch, micro_batch=train.micro_batch, gpu_gib=config.plan.gpu_gib
    )
    trained = trained_parameters(dual, config.optim)
    parts = [
        *(f"assumed: {note}" for note in numbers.notes),
        f"tower: {config.tower.path or config.tower.architecture}, {tower.image_size} px, {tower.num_hidden_layers} "
        f"blocks x {tower.hidden_size}, {sum(p.numel() for p in dual.tower.parameters()):,} parameters",
        f"projection_dim {config.dual.projection_dim}, LLM embeddings {numbers.width} wide",
        plans.describe_run(plan, ds_config, samples=numbers.samples, world=world),
        plans.describe_parameters(trained, config.optim.weight_decay),
        cache_line(numbers),
        f"a checkpoint: {checkpoint / 1e9:.1f} GB, kept: {train.save_total_limit or 'all'}",
        plans.describe_rank(model, plan, ds_config, world=world, gpu_gib=config.plan.gpu_gib),
        plans.describe_columns(table, train.global_batch, config.plan.gpu_gib),
        commands(config, command, table),
        plans.describe_deepspeed(ds_config),
    ]
    return "\n".join(parts)


def look(config: RunConfig) -> Numbers:
    """Data and caches as they are; what is missing is assumed, and said."""
    config.validate(needs_data=False)
    notes = []
    if config.data.path and _has_caches(config):
        data = open_data(config)
        captions = sum(cache.manifest.captions for cache in data.caches)
        return Numbers(samples=data.samples, captions=captions, width=data.caches[0].width, notes=())
    samples = config.plan.images
    if config.data.path:
        samples = sum(len(open_source(source)) for source in config.data.sources)
        notes.append(f"no embedding cache beside the data; {config.plan.captions} captions an image")
    else:
        notes.append(f"{samples:,} images x {config.plan.captions} captions (--plan.images, or --data.path)")
        notes += [f"data as the paper's, {mixture}" for mixture in TOWER_MIXTURES]
    width = config.dual.llm_width or ASSUMED_WIDTH
    if not config.dual.llm_width:
        known = ", ".join(f"{teacher.width} for {name}" for name, teacher in TEACHERS.items())
        notes.append(f"LLM embeddings {width} wide (--dual.llm-width: {known})")
    return Numbers(samples=samples, captions=samples * config.plan.captions, width=width, notes=tuple(notes))


def _has_caches(config: RunConfig) -> bool:
    """Whether the run says its caches or has one beside each path."""
    if config.data.cache:
        return True
    try:
        for path in config.data.path:
            find_cache(path)
    except FileNotFoundError:
        return False
    return True


def cache_line(numbers: Numbers) -> str:
    """Size of the embedding cache on disk, in both of its formats."""
    sizes = [
        shard_bytes(numbers.samples, numbers.captions, numbers.width, dtype, key_bytes=KEY_BYTES) / 1e9
        for dtype in ("float16", "int8")
    ]
    about = f"cache on disk: {numbers.captions:,} captions x {numbers.width}"
    return f"{about}: float16 {sizes[0]:,.1f} GB, int8 {sizes[1]:,.1f} GB"


def commands(config: RunConfig, command: Sequence[str], table: list[plans.Column]) -> str:
    """What comes before the run, if it is missing, and the run itself on 1, 8 and 64 GPUs."""
    words = [word for word in command if word not in ("--dry-run", "--dry_run")]
    before = []
    if not config.tower.path:
        before.append(f"llm2clip import CHECKPOINT --output towers/{config.tower.architecture}")
        words += ["--tower.path", f"towers/{config.tower.architecture}"]
    if not config.data.path:
        teacher = next((t for t in TEACHERS.values() if t.width == config.dual.llm_width), None)
        llm = f"{teacher.released} --preset {teacher.preset}" if teacher else "LLM"
        before.append(f"llm2clip embed DATA --llm {llm}")
        words += ["--data.path", "DATA"]
    if not config.deepspeed:
        words += ["--deepspeed", "scripts/zero1.json"]
    batches = (config.train.global_batch, config.train.micro_batch)
    return plans.describe_commands("scripts/train_tower.py", words, table, batches, before=before)
