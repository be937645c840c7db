"""``train-tower --dry-run``: what a run would do, from its configuration and its data, if any.
No run imports it."""

from dataclasses import dataclass

from llm2clip_plugin.data.sources import open_source
from llm2clip_plugin.plan.describe import describe_run
from llm2clip_plugin.plan.tower import (
    describe_heads,
    describe_tower,
    describe_tower_memory,
)
from llm2clip_plugin.stages.run import configure_deepspeed
from llm2clip_plugin.stages.settings import TEACHERS, rank_and_world
from llm2clip_plugin.stages.tower_config import RunConfig
from llm2clip_plugin.stages.tower_data import (
    check_data,
    lacks_loader_memory,
    open_data,
    open_evaluation,
)
from llm2clip_plugin.train.losses.base import (
    check_patch_layers,
    chosen_terms,
    patch_layers,
)
from llm2clip_plugin.train.model import shape_dual, trained_parameters, with_llm_width

ASSUMED_WIDTH = TEACHERS["llama-8b"].width  # of an embedding, while the LLM is unknown


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """What a plan needs to know of the data."""

    samples: int  # of an epoch
    width: int  # of an embedding
    assumed: tuple[str, ...] = ()  # a line for each thing that is missing and assumed


def tower_plan(config: RunConfig) -> str:
    """The plan as text. Raises what would stop the run itself."""
    _, world = rank_and_world()
    size = measure_data(config)
    dual = with_llm_width(config.dual, size.width)
    model = shape_dual(config.tower, dual)
    tower = model.tower.config
    terms = chosen_terms(config.loss)
    check_patch_layers(patch_layers(terms), tower.num_hidden_layers)
    deepspeed = configure_deepspeed(
        config.deepspeed,
        config.train,
        config.optim,
        output_dir=config.output_dir,
        world=world,
        hidden_size=tower.hidden_size,
    )
    trained = trained_parameters(model, config.optim)
    run = describe_run(
        config.train, config.optim, deepspeed, trained, size.samples, world
    )
    memory = describe_tower_memory(
        config.tower,
        dual,
        terms,
        config.optim,
        config.train,
        captions_per_image=config.data.captions_per_image,
        gpu_gib=config.plan.gpu_gib,
    )
    lacking = lacks_loader_memory(
        config.train,
        config.heads,
        config.evaluated,
        captions_per_image=config.data.captions_per_image,
        side=tower.image_size,
        width=size.width,
        world=world,
    )
    parts = [f"assumed: {line}" for line in size.assumed]
    parts.append(describe_tower(model, config.tower))
    if config.heads.steps:
        parts.append(describe_heads(config.heads))
    parts.append(run)
    parts.append(memory)
    if lacking:
        parts.append(f"too many loader processes for this machine: {lacking}")
    return "\n".join(parts)


def measure_data(config: RunConfig) -> DataSize:
    """The size of the data; of what is not there yet, what --assumed-samples and --dual.llm-width
    say."""
    samples = config.plan.images
    assumed = f"{config.plan.images:,} images (--assumed-samples, or DATA)"
    if config.evaluates:
        from llm2clip_plugin.evaluate.in_training import open_suites

        open_suites(config.benchmarks)  # one that is missing stops the run
    if config.data.path:
        try:
            data = open_data(config.data, clip_width=config.clip_width)
            evaluation = open_evaluation(
                config.evaluated, config.data, config.benchmarks, data.teacher
            )
        except FileNotFoundError as error:  # no cache yet
            if config.data.cache:
                raise
            samples = sum(len(open_source(source)) for source in config.data.sources)
            assumed = str(error)
        else:
            check_data(
                data,
                evaluation,
                global_batch=config.train.global_batch,
                mask_same_image=config.loss.mask_same_image,
            )
            return DataSize(samples=data.samples, width=data.width)
    if config.dual.llm_width:
        return DataSize(
            samples=samples, width=config.dual.llm_width, assumed=(assumed,)
        )
    widths = ", ".join(
        f"{teacher.width} for {name}" for name, teacher in TEACHERS.items()
    )
    width = f"LLM embeddings of width {ASSUMED_WIDTH} (--dual.llm-width: {widths})"
    return DataSize(samples=samples, width=ASSUMED_WIDTH, assumed=(assumed, width))
