"""Stage 2: captioned images and a cache in, a trained and exported tower out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.plan.memory import StepMemory, recomputes, tower_memory
from llm2clip_plugin.progress import phase
from llm2clip_plugin.run_folder import UNFINISHED_HEADS
from llm2clip_plugin.signals import StopRequest, loaded, stop_requests
from llm2clip_plugin.stages.run import (
    MEASURED,
    PICTURES,
    TrainingRun,
    open_run,
    training_ranks,
)
from llm2clip_plugin.stages.tower_config import RunConfig
from llm2clip_plugin.stages.tower_data import (
    TowerData,
    check_data,
    check_loaders,
    make_batches,
    open_data,
    open_evaluation,
    with_windows,
)
from llm2clip_plugin.stages.tower_export import TOWER, export_towers
from llm2clip_plugin.train.averages import Averages, copy_image_side, make_averages
from llm2clip_plugin.train.checkpoint import Loaded, TrainState, load_weights
from llm2clip_plugin.train.config import DistillConfig, TrainConfig
from llm2clip_plugin.train.distributed import on_first_rank, rank
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.guard import check_finite, locked
from llm2clip_plugin.train.heads import FitLine, fit_heads, load_clip_heads
from llm2clip_plugin.train.losses.base import (
    ChosenTerms,
    check_patch_layers,
    chosen_terms,
    needs_reference,
    patch_layers,
    weighted_terms,
)
from llm2clip_plugin.train.model import (
    accelerate,
    build_dual,
    enable_gradient_checkpointing,
    trained_parameters,
    with_llm_width,
)
from llm2clip_plugin.train.optim import Trained
from llm2clip_plugin.train.step import TowerStep
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.towers import preprocessor_config

if TYPE_CHECKING:
    from llm2clip_plugin.evaluate.in_training import Evaluation


def train_tower(config: RunConfig, *, command: dict[str, Any] | None = None) -> Path:
    """Train a tower; returns the directory of the exported tower.

    The same call resumes from the newest checkpoint of ``config.output_dir``. Raises ValueError,
    FileNotFoundError or ContractError for what the user can correct, NonFiniteLossError for a loss
    that is NaN or infinite. ``command``: run_folder.started_by, for run.json.
    """
    # the handlers outlive the watch: a launcher's SIGTERM must not end this rank before it says
    # which one failed
    with stop_requests() as stop, training_ranks(config.train) as device:
        with phase("opening the data"):
            config.validate()
            data = open_data(config.data, clip_width=config.clip_width)
            evaluation = open_evaluation(
                config.evaluated, config.data, config.benchmarks, data.teacher
            )
        with locked(Path(config.output_dir)):
            with phase("checking the data"):
                on_first_rank(
                    lambda: check_data(
                        data,
                        evaluation,
                        global_batch=config.train.global_batch,
                        mask_same_image=config.loss.mask_same_image,
                    )
                )
            if evaluation is not None:
                with phase("embedding the benchmarks' texts"):
                    evaluation.embed(data.teacher)
            decided = with_windows(data, global_batch=config.train.global_batch)
            dual = with_llm_width(config.dual, decided.width)
            config = dataclasses.replace(config, data=decided.config, dual=dual)
            run, start = _start(
                config, decided, evaluation, device, stop, command or {}
            )
            state = _make_steps(config, decided, evaluation, run, start, device, stop)
            has_average = bool(config.train.ema_decay)
            with phase("export"):
                on_first_rank(
                    lambda: export_towers(run.folder, state.step, averaged=has_average)
                )
            return run.folder / TOWER


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the steps of a run start from."""

    model: DualEncoder  # with the weights of the checkpoint, or with fitted heads
    images: ImageConfig  # what it reads
    trained: list[Trained]
    terms: ChosenTerms  # of the loss
    resumed: Loaded | None  # the checkpoint, None for a new run
    heads_curve: list[FitLine]  # of the fit of the heads, if there was one


def _start(
    config: RunConfig,
    data: TowerData,
    evaluation: Evaluation | None,
    device: torch.device,
    stop: StopRequest,
    command: dict[str, Any],
) -> tuple[TrainingRun, Start]:
    """The model as the steps start from it: new, with fitted heads, or as the run's checkpoint has
    it."""
    model = build_dual(config.tower, config.dual, seed=config.train.seed)
    if config.heads.target == "clip_text":
        load_clip_heads(model, config.tower.path)
    terms = chosen_terms(config.loss)
    check_patch_layers(patch_layers(terms), model.tower.config.num_hidden_layers)
    images = ImageConfig.from_preprocessor(preprocessor_config(model.tower))
    check_loaders(data, images, config.train, config.heads, config.evaluated)
    trained = trained_parameters(model, config.optim)

    measured = evaluation.measured if evaluation is not None else ""
    with phase("comparing the pictures"):
        pictures = on_first_rank(lambda: data.pictures)
    learned_from = {**data.learned_from, PICTURES: pictures}
    run = open_run(
        config,
        samples=data.samples,
        hidden_size=model.tower.config.hidden_size,
        learned_from={**learned_from, MEASURED: measured},
        teacher=dataclasses.asdict(data.teacher),
        command=command,
    )
    evaluated_digests = evaluation.digests if evaluation is not None else {}
    resumed = run.find_checkpoint(data.digests | evaluated_digests)
    load_start(model, resumed, config.tower.path)

    heads_curve: list[FitLine] = []
    if resumed is None and config.heads.steps:
        run.record(run.new_state())
        loaded()
        with phase("heads"):
            heads_curve = fit_heads(
                model,
                data.sources,
                data.caches,
                images,
                config.heads,
                config.loss,
                config.train,
                caption_weights=data.config.kind_weights,
                clip_caches=data.clip_caches,
                device=device,
                stop=stop,
                unfinished=run.folder / UNFINISHED_HEADS,
                learned_from={
                    "tower": dataclasses.asdict(config.tower),
                    "dual": dataclasses.asdict(config.dual),
                    **learned_from,
                },
            )
    start = Start(
        model=model,
        images=images,
        trained=trained,
        terms=terms,
        resumed=resumed,
        heads_curve=heads_curve,
    )
    return run, start


def _make_steps(
    config: RunConfig,
    data: TowerData,
    evaluation: Evaluation | None,
    run: TrainingRun,
    start: Start,
    device: torch.device,
    stop: StopRequest,
) -> TrainState:
    """Train from the start to the end: engine, step, evaluation, loop; returns the last state."""
    measure_memory = partial(
        tower_memory,
        config.tower,
        config.dual,
        start.terms,
        config.optim,
        config.train,
        captions_per_image=config.data.captions_per_image,
        checkpointing=False,
    )
    engine, averages = _start_engine(
        run,
        start,
        config.train,
        config.distill,
        measure_memory,
        device=device,
    )
    state = run.start_state(start.resumed)
    step = TowerStep(
        engine,
        weighted_terms(config.loss),
        seed=config.train.seed,
        text_noise=config.dual.input_noise > 0,
        normalize=Normalize(start.images, engine.device),
        total_samples=run.total_steps * config.train.global_batch,
        reference=averages.reference,
        patch_layers=patch_layers(start.terms),
    )
    evaluate = None
    if evaluation is not None:
        show = engine.monitors.pictures.update if run.shows_pictures else None
        evaluate = partial(evaluation, start.model, start.images, show)
    # random ones have no scores to compare with
    has_heads = bool(config.heads.steps or config.tower.keep_heads)
    batches = make_batches(data, config.train, start.images, state.samples)
    state = run.train_to_end(
        engine,
        state,
        step=step,
        batches=iter(batches),
        evaluate=evaluate,
        before=evaluate if config.train.eval_on_start and has_heads else None,
        heads=start.heads_curve,
        stop=stop,
        averages=averages.by_file,
    )
    if rank() == 0:
        (run.folder / UNFINISHED_HEADS).unlink(missing_ok=True)
    return state


def _start_engine(
    run: TrainingRun,
    start: Start,
    train: TrainConfig,
    distill: DistillConfig,
    measure_memory: Callable[[], StepMemory],
    *,
    device: torch.device,
) -> tuple[Engine, Averages]:
    """The engine over the model as it trains, and what follows its weights. measure_memory: what a
    step needs without gradient checkpointing."""
    image_side = None
    if needs_reference(start.terms):
        # before its blocks are compiled, and the engine partitions the weights under ZeRO-3
        image_side = copy_image_side(start.model)
        accelerate(image_side.tower, train, device)
    accelerate(start.model.tower, train, device)
    if recomputes(train, run.deepspeed, device, measure_memory):
        enable_gradient_checkpointing(start.model.tower)
    engine = run.make_engine(start.model, start.trained, start.resumed)
    averages = make_averages(
        engine, image_side, train.ema_decay, distill, start.resumed
    )
    return engine, averages


def load_start(model: DualEncoder, resumed: Loaded | None, tower: str) -> None:
    """Load a checkpoint's weights, if there is one. Every rank must call this; raises ValueError on
    the first for weights that are not finite."""
    source: Path | str = tower
    if resumed is not None:
        load_weights(model, resumed.weights, where=resumed.path)
        source = resumed.path
    on_first_rank(lambda: check_finite(model, source))
