"""``finetune-llm --dry-run``: what a run would do, from its configuration and its data, if any.
No run imports it."""

from pathlib import Path

from llm2clip_plugin.evaluate.captions import check_captions
from llm2clip_plugin.plan.describe import describe_run
from llm2clip_plugin.plan.llm import (
    describe_llm,
    describe_llm_memory,
    describe_lora,
    shape_llm,
)
from llm2clip_plugin.stages.llm_config import FinetuneConfig
from llm2clip_plugin.stages.llm_data import LlmData
from llm2clip_plugin.stages.run import configure_deepspeed
from llm2clip_plugin.stages.settings import rank_and_world
from llm2clip_plugin.text.config import effective
from llm2clip_plugin.text.finetune import (
    HIDDEN_SIZE,
    refuse_contradictions,
    trained_parameters,
)
from llm2clip_plugin.text.llm import llm_config
from llm2clip_plugin.train.optim import zero_stage


def llm_plan(config: FinetuneConfig) -> str:
    """The plan as text. Raises what would stop the run itself."""
    _, world = rank_and_world()
    settings = llm_config(config.encoder)
    adapter = Path(config.encoder.adapter) if config.encoder.adapter else None
    encoder, _ = effective(config.encoder, Path(config.encoder.llm), adapter)
    if config.evaluation.captions:
        check_captions(config.evaluation, config.pairs.read)
    notes = [f"assumed: {config.plan.images:,} pairs (--assumed-samples, or DATA)"]
    samples = config.plan.images
    # query and positive, perhaps a hard negative
    texts = 3 if config.pairs.random_negatives else 2
    if config.pairs.data:
        data = LlmData(config.pairs, config.train, rank=0, world=1)
        notes = data.lines
        samples = data.samples
        if data.has_negatives:
            texts = 3
    deepspeed = configure_deepspeed(
        config.deepspeed,
        config.train,
        config.optim,
        output_dir=config.output_dir,
        world=world,
        hidden_size=HIDDEN_SIZE,
    )
    refuse_contradictions(
        encoder,
        config.lora,
        config.train,
        config.start_adapters,
        zero_stage=zero_stage(deepspeed),
    )
    shape = shape_llm(settings, encoder, config.lora, config.train.precision)
    trained = trained_parameters(shape.llm, config.optim.lr)
    tables = describe_llm_memory(
        shape,
        settings,
        encoder,
        config.lora,
        config.contrast,
        config.optim,
        config.train,
        texts=texts,
        gpu_gib=config.plan.gpu_gib,
    )
    run = describe_run(config.train, config.optim, deepspeed, trained, samples, world)
    llm = describe_llm(shape, encoder, config.start_adapters)
    lora = describe_lora(shape, encoder, config.lora)
    return "\n".join([*notes, run, llm, lora, *tables])
