"""Stage 1 assembled, ``llm2clip finetune-llm``: an LLM and captions in, an adapter that tells captions apart out.

The loop, engine, step, checkpoints and loss are the tower's; what is the LLM's own is in ``text``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.contracts import EncoderCard, RunRecord, canonical_json, sha256_text
from llm2clip_plugin.data.sampler import epoch_draws
from llm2clip_plugin.evaluate.caption_set import CaptionSetConfig, measure_captions
from llm2clip_plugin.stages.plan_text import PlanConfig, describe_deepspeed, describe_run
from llm2clip_plugin.stages.tower.config import refuse_changes
from llm2clip_plugin.text.contrast import CaptionStep, ContrastConfig, PairModule, caption_terms
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.lora import LoraSettings, add_lora, save_adapter
from llm2clip_plugin.text.mntp import MaskedModule, MaskedStep, output_head
from llm2clip_plugin.text.pair_batches import PairBatches
from llm2clip_plugin.text.pairs import PairsConfig, Survey, open_pairs, survey
from llm2clip_plugin.text.settings import CARD_SETTINGS, EncoderConfig
from llm2clip_plugin.train.checkpoint import Checkpoints, Loaded, TrainState, load
from llm2clip_plugin.train.deepspeed_config import EnginePlan, complete, read_deepspeed_json, zero_stage
from llm2clip_plugin.train.distributed import barrier, rank, world_size
from llm2clip_plugin.train.engine import Engine, start_ranks
from llm2clip_plugin.train.loop import LoopParts, StepFunction, TrainConfig, run_loop
from llm2clip_plugin.train.optim import OptimConfig, Trained, is_vector, parameter_groups
from llm2clip_plugin.train.stopping import stop_requests
from llm2clip_plugin.vision.export import library_versions

ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class LlmPlanConfig:
    """What --dry-run assumes where there is no data yet."""

    assumed_pairs: int = PlanConfig.images  # pairs of texts: one of each image of the paper's smaller tower data
    gpu_gib: float = PlanConfig.gpu_gib  # memory of a GPU, in GiB: micro-batches are proposed for it

    def __post_init__(self) -> None:
        if self.assumed_pairs < 1 or self.gpu_gib <= 0:
            raise ValueError(f"assumed_pairs {self.assumed_pairs} and gpu_gib {self.gpu_gib} must both be above 0")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Teach an LLM to tell captions apart. Usage: llm2clip finetune-llm DATA [DATA ...] --llm PATH_OR_HUB_ID."""

    output_dir: str = "runs/llm"  # checkpoints, metrics.jsonl, run.json and, at the end, adapter/
    deepspeed: str = ""  # your DeepSpeed JSON (scripts/zero*.json); "": ZeRO-0
    resume: str = "auto"  # auto: this run's newest checkpoint, if any | never | a checkpoint or run folder
    allow_changed: tuple[str, ...] = ()  # fields that may differ from the checkpoint's, as optim.lr
    dry_run: bool = False  # print pairs, steps, memory, commands, and stop; finetune-llm needs no weights or data
    pairs: PairsConfig = field(default_factory=PairsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=2e-4, weight_decay=0.0, layer_decay=1.0, betas=(0.9, 0.999), max_grad_norm=1.0, warmup_steps=300
        )
    )
    train: TrainConfig = field(default_factory=lambda: TrainConfig(global_batch=512, num_train_epochs=1.0))
    evaluation: CaptionSetConfig = field(default_factory=CaptionSetConfig)
    plan: LlmPlanConfig = field(default_factory=LlmPlanConfig)

    @property
    def hash(self) -> str:
        """SHA-256 over the configuration."""
        return sha256_text(canonical_json(dataclasses.asdict(self)))


StepMaker = Callable[[Engine], StepFunction]


def finetune_llm(config: FinetuneConfig, command: Sequence[str] = ()) -> Path | None:
    """Train an adapter to tell captions apart; returns its folder, None if the run was stopped or only planned.

    ``command``: options of the command line, for the commands that a dry run prints.
    The same call goes on from the newest checkpoint of ``config.output_dir``. Raises ValueError, FileNotFoundError or
    ContractError for what the user can mend, NonFiniteLossError for a loss that is no number.
    """

    if config.dry_run:
        from llm2clip_plugin.stages.llm.plan import llm_plan

        if os.environ.get("RANK", "0") == "0":
            print(llm_plan(config, command), flush=True)
        return None

    def contrastive(encoder: CaptionEncoder, surveys: Sequence[Survey]) -> tuple[torch.nn.Module, StepMaker]:
        for found in surveys:
            tell_long_texts(found, encoder, cut_queries=config.pairs.cut_queries)
        terms, contrast = caption_terms(config.contrast), config.contrast
        module = trained_module(encoder, config)
        return module, lambda engine: CaptionStep(engine, terms, encoder, contrast, seed=config.train.seed)

    return train_adapter(config, contrastive)


def pretrain_llm(config: FinetuneConfig) -> Path | None:
    """Train an adapter to predict masked tokens of the same texts; otherwise as ``finetune_llm``."""
    if config.encoder.layer != -1:
        raise ValueError(f"layer is {config.encoder.layer}; the LLM's head, which predicts tokens, sits on the last")

    def masked(encoder: CaptionEncoder, surveys: Sequence[Survey]) -> tuple[torch.nn.Module, StepMaker]:
        head = output_head(encoder)
        module = MaskedModule(trained_module(encoder, config).model, head).train()
        return module, lambda engine: MaskedStep(engine, encoder, seed=config.train.seed)

    return train_adapter(config, masked)


def train_adapter(
    config: FinetuneConfig,
    assemble: Callable[[CaptionEncoder, Sequence[Survey]], tuple[torch.nn.Module, StepMaker]],
) -> Path | None:
    """Data, LLM, engine, loop, adapter; ``assemble`` says what is learned."""
    device = start_ranks()
    opened = open_data(config, rank(), world_size())
    plan = engine_plan(config, opened.samples, world_size())
    ds_config = complete(read_deepspeed_json(config.deepspeed), plan, where=config.deepspeed or "the run")
    refuse_combinations(config, ds_config)
    if rank() == 0:
        print("\n".join(opened.lines()), flush=True)
    if config.dry_run:
        if rank() == 0:
            print(describe_run(plan, ds_config, samples=opened.samples, world=world_size()))
            print(describe_deepspeed(ds_config), flush=True)
        return None
    checkpoints = Checkpoints(Path(config.output_dir), keep=config.train.save_total_limit)
    identity = {**dataclasses.asdict(config), "samples": opened.samples}
    resumed = resume(checkpoints, config, identity)
    encoder = CaptionEncoder(config.encoder, device, trainable_adapter=True)
    module, make_step = assemble(encoder, opened.surveys)
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if resumed is not None:
        for name, parameter in trained:
            parameter.data.copy_(resumed.weights[name])
    groups = parameter_groups(
        [Trained(name=n, parameter=p, lr=config.optim.lr, decay=not is_vector(p)) for n, p in trained],
        config.optim.weight_decay,
    )
    adam = {"lr": config.optim.lr, "betas": config.optim.betas, "eps": config.optim.eps}
    engine = Engine(module, groups, adam, ds_config, keep_frozen=False)
    state = TrainState(step=0, samples=0, config=identity, config_hash=config.hash, seed=config.train.seed)
    if resumed is not None:
        state = resumed.state
        engine.restore(resumed.weights, resumed.moments, vars(state))
    record(config, state)
    with stop_requests() as stop:
        state = run_loop(
            LoopParts(
                step=make_step(engine),
                batches=opened.batches.start(state.samples),
                engine=engine,
                average=None,
                checkpoints=checkpoints,
                evaluate=evaluation(encoder, config),
                train=config.train,
                optim=config.optim,
                total_steps=plan.total_steps,
                run_folder=Path(config.output_dir),
                state=state,
                stop=stop,
            )
        )
    return finish(config, state, encoder, checkpoints, plan.total_steps)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The pairs of a run."""

    surveys: tuple[Survey, ...]  # of each source
    samples: int  # pairs of an epoch
    batches: PairBatches  # of a rank

    def lines(self) -> list[str]:
        """What the surveys found."""
        return [line for found in self.surveys for line in found.lines()]


def open_data(config: FinetuneConfig, rank: int, world: int) -> Opened:
    """Every data set, looked at. Raises FileNotFoundError or ValueError for what is missing or too small."""
    sources = open_pairs(config.pairs)
    batches = PairBatches(
        sources,
        config.pairs.weights,
        seed=config.train.seed,
        global_batch=config.train.global_batch,
        rank=rank,
        world=world,
    )
    samples = sum(epoch_draws(list(map(len, sources)), config.pairs.weights or [1.0] * len(sources)))
    return Opened(surveys=tuple(survey(source, config.pairs) for source in sources), samples=samples, batches=batches)


def tell_long_texts(found: Survey, encoder: CaptionEncoder, *, cut_queries: bool) -> None:
    """Say how many texts will be cut to max_tokens. Raises ValueError for a query, unless ``cut_queries``: what is
    asked would lose its end."""
    limit = encoder.config.max_tokens
    queries = encoder.lengths([pair.query for pair in found.pairs], query=True)
    long = [(length, pair.key) for length, pair in zip(queries, found.pairs, strict=True) if length > limit]
    if long and not cut_queries:
        length, key = max(long)
        raise ValueError(
            f"{found.path}: {len(long)} of {len(queries)} queries looked at are longer than max_tokens {limit}, the "
            f"longest {length} (sample {key!r}); raise --max-tokens, or take them cut with --cut-queries"
        )
    positives = sum(length > limit for length in encoder.lengths([pair.positive for pair in found.pairs]))
    if (long or positives) and rank() == 0:
        print(
            f"{found.path}: of {len(queries)} pairs {len(long)} queries and {positives} positives "
            f"are cut to {limit} tokens"
        )


def trained_module(encoder: CaptionEncoder, config: FinetuneConfig) -> PairModule:
    """The encoder's LLM with an adapter that trains; nothing else does."""
    if not config.encoder.adapter:
        torch.manual_seed(config.train.seed)
        encoder.model.llm = add_lora(encoder.model.llm, config.lora, base=config.encoder.llm)
    if config.train.gradient_checkpointing:
        encoder.model.llm.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return PairModule(encoder.model, config.contrast).train()


def refuse_combinations(config: FinetuneConfig, ds_config: dict[str, Any]) -> None:
    """What does not go together, said before anything is loaded."""
    if config.encoder.load_in_4bit and zero_stage(ds_config) == 3:
        raise ValueError("ZeRO-3 can't cut up 4-bit weights; use ZeRO-2 (scripts/zero2.json), or no load_in_4bit")
    if config.train.ema_decay:
        raise ValueError(f"train.ema_decay is {config.train.ema_decay}; adapters are trained without a moving average")
    if any(path.endswith(".txt") for path in config.pairs.data) and not config.lora.dropout:
        raise ValueError("a text paired with itself differs by dropout alone, and lora.dropout is 0; set it to 0.1")
    if config.train.precision != "fp32" and config.encoder.compute_dtype == "float32":
        raise ValueError(
            f"train.precision {config.train.precision} would turn the LLM's float32 weights into it; leave precision "
            "at fp32 (the adapter's) and say the LLM's dtype with --compute-dtype"
        )


def engine_plan(config: FinetuneConfig, samples: int, world: int) -> EnginePlan:
    """The run's decisions in DeepSpeed's terms."""
    _, micro, accumulation = config.train.rows(world)
    steps = config.train.steps(samples)
    optim = config.optim
    return EnginePlan(
        global_batch=config.train.global_batch,
        micro_batch=micro,
        accumulation=accumulation,
        precision=config.train.precision,
        max_grad_norm=optim.max_grad_norm,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        schedule=optim.schedule,
        warmup_steps=optim.warmup(steps),
        total_steps=steps,
        hidden_size=1024,  # sizes ZeRO-3's "auto" buckets alone
        report_to=config.train.report_to,
        output_dir=config.output_dir,
        run_name=Path(config.output_dir).name,
    )


def resume(checkpoints: Checkpoints, config: FinetuneConfig, identity: dict[str, Any]) -> Loaded | None:
    """The checkpoint to go on from, None for a new run; ValueError if its settings are others."""
    path = checkpoints.find(config.resume)
    if path is None:
        return None
    loaded = load(path)
    refuse_changes(loaded.state.config, identity, config.allow_changed, where=str(path))
    state = dataclasses.replace(loaded.state, config=identity, config_hash=config.hash)
    return dataclasses.replace(loaded, state=state)


def evaluation(encoder: CaptionEncoder, config: FinetuneConfig) -> Callable[[], dict[str, float]] | None:
    """Caption retrieval accuracy on the held-out captions; None without any."""
    if not config.evaluation.captions:
        return None

    def evaluate() -> dict[str, float]:
        encoder.model.eval()
        scores = measure_captions(encoder, config.evaluation)
        encoder.model.train()
        return {row.name: row.cra for row in scores}

    return evaluate


def record(config: FinetuneConfig, state: TrainState, *, finished: bool = False) -> None:
    """``run.json``: the configuration and where the run stands; rank 0 writes."""
    if rank() == 0:
        RunRecord(
            config=dataclasses.asdict(config),
            config_hash=config.hash,
            step=state.step,
            samples=state.samples,
            finished=finished,
            metrics=state.metrics,
            versions=library_versions(),
        ).write(Path(config.output_dir) / RunRecord.FILE)


def finish(
    config: FinetuneConfig, state: TrainState, encoder: CaptionEncoder, checkpoints: Checkpoints, total_steps: int
) -> Path | None:
    """Note where the run stands; write the adapter if it is at its end."""
    finished = state.step >= total_steps
    record(config, state, finished=finished)
    target = Path(config.output_dir) / ADAPTER
    newest = checkpoints.latest()
    if finished and newest is not None and rank() == 0:
        prefix = "model.llm."
        trained = {n.removeprefix(prefix): t for n, t in load(newest).weights.items() if n.startswith(prefix)}
        save_adapter(encoder.model.llm, trained, card_of(encoder, config, state), target, replace=True)
    barrier()
    return target if finished else None


def card_of(encoder: CaptionEncoder, config: FinetuneConfig, state: TrainState) -> EncoderCard:
    """How the adapter embeds, and where it comes from."""
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
            "scale": config.contrast.scale,
            "quantization": identity.quantization,
            "config_hash": config.hash,
        },
        metrics=state.metrics,
        versions=library_versions(),
    )
