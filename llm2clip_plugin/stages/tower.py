"""Stage 2: captioned images and a cache in, a trained and exported tower out."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.plan.memory import recomputes, tower_memory
from llm2clip_plugin.progress import phase
from llm2clip_plugin.run_folder import UNFINISHED_HEADS
from llm2clip_plugin.signals import StopRequest, loaded, stop_requests
from llm2clip_plugin.stages.run import TrainingRun, open_run, training_ranks
from llm2clip_plugin.stages.tower_config import RunConfig
from llm2clip_plugin.stages.tower_data import (
    TowerData,
    check_data,
    check_loaders,
    make_batches,
    open_data,
    with_windows,
)
from llm2clip_plugin.stages.tower_export import TOWER, export_towers
from llm2clip_plugin.train.averages import Averages, copy_image_side, make_averages
from llm2clip_plugin.train.checkpoint import Loaded, load_weights
from llm2clip_plugin.train.config import (
    HeadsConfig,
    LossConfig,
    TowerConfig,
    TrainConfig,
)
from llm2clip_plugin.train.distributed import on_first_rank, rank
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.guard import check_finite, locked
from llm2clip_plugin.train.heads import FitLine, fit_heads, load_clip_heads
from llm2clip_plugin.train.losses.base import (
    check_patch_layers,
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
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.towers import preprocessor_config


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
            evaluated = config.evaluated if config.evaluates else None
            data = open_data(
                config.data, config.heads, config.dual, config.benchmarks, evaluated
            )
        with locked(Path(config.output_dir)):
            with phase("checking the data"):
                on_first_rank(lambda: check_data(data, config.train, config.loss))
            if data.evaluation is not None:
                with phase("embedding the benchmarks' texts"):
                    data.evaluation.embed(data.teacher)
            decided = with_windows(data, global_batch=config.train.global_batch)
            dual = with_llm_width(config.dual, decided.width)
            config = dataclasses.replace(config, data=decided.config, dual=dual)
            return _train(config, decided, device, stop, command or {})


def _train(
    config: RunConfig,
    data: TowerData,
    device: torch.device,
    stop: StopRequest,
    command: dict[str, Any],
) -> Path:
    dual = build_model(
        config.tower, config.dual, config.heads, config.loss, seed=config.train.seed
    )
    images = ImageConfig.from_preprocessor(preprocessor_config(dual.tower))
    evaluated = config.evaluated if config.evaluates else None
    check_loaders(data, images, config.train, config.heads, evaluated)
    trained = trained_parameters(dual, config.optim)
    run = open_run(
        config,
        samples=data.samples,
        hidden_size=dual.tower.config.hidden_size,
        learned_from=data.learned_from,
        teacher=dataclasses.asdict(data.teacher),
        command=command,
    )
    resumed = run.find_checkpoint(data.digests)
    load_start(dual, resumed, config.tower.path)
    unfinished = run.folder / UNFINISHED_HEADS
    curve: list[FitLine] = []
    if resumed is None and config.heads.steps:
        run.record(run.new_state())
        loaded()
        curve = fit(
            dual,
            data,
            images,
            config.heads,
            config.loss,
            config.train,
            device=device,
            stop=stop,
            unfinished=unfinished,
        )
    engine, averages = _start_engine(config, run, dual, trained, resumed, device)
    start = run.start_state(resumed)
    step = TowerStep(
        engine,
        weighted_terms(config.loss),
        seed=config.train.seed,
        text_noise=config.dual.input_noise > 0,
        normalize=Normalize(images, engine.device),
        total_samples=run.total_steps * config.train.global_batch,
        reference=averages.reference,
        patch_layers=patch_layers(config.loss),
    )
    evaluate = None
    if data.evaluation is not None:
        show = engine.pictures.update if run.shows_pictures else None
        evaluate = partial(data.evaluation, dual, images, show)
    # random ones have no scores to compare with
    has_heads = bool(config.heads.steps or config.tower.keep_heads)
    state = run.train_to_end(
        engine,
        start,
        step=step,
        batches=iter(make_batches(data, config.train, images, start.samples)),
        evaluate=evaluate,
        before=evaluate if config.train.eval_on_start and has_heads else None,
        heads=curve,
        stop=stop,
        averages=averages.by_file,
    )
    if rank() == 0:
        unfinished.unlink(missing_ok=True)
    with phase("export"):
        on_first_rank(
            lambda: export_towers(
                run.folder, state.step, averaged=bool(config.train.ema_decay)
            )
        )
    return run.folder / TOWER


def _start_engine(
    config: RunConfig,
    run: TrainingRun,
    dual: DualEncoder,
    trained: list[Trained],
    resumed: Loaded | None,
    device: torch.device,
) -> tuple[Engine, Averages]:
    """The engine over the model as it trains, and what follows its weights."""
    # before the engine, which partitions the weights under ZeRO-3
    image_side = copy_image_side(dual) if needs_reference(config.loss) else None
    for model in filter(None, (dual, image_side)):
        accelerate(model.tower, config.train, device)
    measure = partial(
        tower_memory,
        config.tower,
        config.dual,
        config.loss,
        config.optim,
        config.train,
        captions_per_image=config.data.captions_per_image,
        checkpointing=False,
    )
    if recomputes(config.train, run.deepspeed, device, measure):
        enable_gradient_checkpointing(dual.tower)
    engine = run.make_engine(dual, trained, resumed)
    return engine, make_averages(
        engine, image_side, config.train, config.distill, resumed
    )


def load_start(dual: DualEncoder, resumed: Loaded | None, tower: str) -> None:
    """Load a checkpoint's weights, if there is one. Every rank must call this; raises ValueError on
    the first for weights that are not finite."""
    if resumed is not None:
        load_weights(dual, resumed.weights, where=resumed.path)
    on_first_rank(
        lambda: check_finite(dual, tower if resumed is None else resumed.path)
    )


def build_model(
    tower: TowerConfig,
    dual: DualConfig,
    heads: HeadsConfig,
    loss: LossConfig,
    *,
    seed: int,
) -> DualEncoder:
    """The tower with its heads, which trains. Raises ValueError for a loss that reads what the
    tower does not have."""
    model = build_dual(tower, dual, seed=seed)
    if heads.target == "clip_text":
        load_clip_heads(model, tower.path)
    check_patch_layers(loss, model.tower.config.num_hidden_layers)
    return model


def fit(
    dual: DualEncoder,
    data: TowerData,
    images: ImageConfig,
    heads: HeadsConfig,
    loss: LossConfig,
    train: TrainConfig,
    *,
    device: torch.device,
    stop: StopRequest,
    unfinished: Path,
) -> list[FitLine]:
    """Fit the heads on the frozen tower, in place; returns the curve."""
    with phase("heads"):
        return fit_heads(
            dual,
            data.sources,
            data.caches,
            images,
            heads,
            loss,
            device=device,
            seed=train.seed,
            bf16=train.precision == "bf16",
            caption_weights=data.config.kind_weights,
            clip_caches=data.clip_caches,
            workers=train.dataloader_num_workers,
            logging_steps=train.logging_steps,
            stop=stop,
            unfinished=unfinished,
            skip_non_finite=train.skip_bad_batches,
        )
