"""Stage 2 assembled: captioned images and a cache in, a trained and exported tower out."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.loader import PairDataset, PairLoader, make_loader
from llm2clip_plugin.data.shared_memory import check_shared_memory
from llm2clip_plugin.evaluate.retrieval_report import evaluate_retrieval
from llm2clip_plugin.interrupt import loaded
from llm2clip_plugin.phases import phase
from llm2clip_plugin.run_files import UNFINISHED_HEADS
from llm2clip_plugin.stages.run_state import TrainingRun, plan_engine, training_ranks
from llm2clip_plugin.stages.tower.checks import check_data, check_patch_layers, check_weights
from llm2clip_plugin.stages.tower.config import RunConfig
from llm2clip_plugin.stages.tower.export import export_run
from llm2clip_plugin.stages.tower.loading import load_plans, with_order
from llm2clip_plugin.stages.tower.notes import notes
from llm2clip_plugin.stages.tower.opening import Data, open_data
from llm2clip_plugin.train.checkpoint import Loaded, load_weights
from llm2clip_plugin.train.distributed import local_world_size, rank, world_size
from llm2clip_plugin.train.ema import MovingAverage
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.heads import FitLine, HeadsConfig, fit_heads, head_parameters, load_clip_heads
from llm2clip_plugin.train.loop import Evaluate
from llm2clip_plugin.train.losses.config import weighted_terms
from llm2clip_plugin.train.model import build_dual, enable_gradient_checkpointing, trained_parameters, with_llm_width
from llm2clip_plugin.train.run_checkpoints import Checkpoints
from llm2clip_plugin.train.run_lock import locked
from llm2clip_plugin.train.step import TowerStep
from llm2clip_plugin.train.stopping import StopRequest, stop_requests
from llm2clip_plugin.train.twin import Twin
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.preprocessor import preprocessor_config
from llm2clip_plugin.vision.towers import use_fastest_attention

TOWER, TOWER_EMA = "tower", "tower-ema"
FITTED_FOR_SCORES = HeadsConfig(steps=100, max_images=20_000)


def train_tower(config: RunConfig, *, command: dict[str, Any] | None = None) -> Path:
    """Train a tower; returns the directory of the exported tower.

    The same call resumes from the newest checkpoint of ``config.output_dir``. Raises ValueError, FileNotFoundError or
    ContractError for what the user can correct, NonFiniteLossError for a loss that is NaN or infinite. ``command``:
    see run_files.started_by; recorded in run.json.
    """
    # the handlers outlive the watch: a launcher's SIGTERM must not end this rank before it says which one failed
    with stop_requests() as stop, training_ranks(config.train) as device:
        with phase("opening the data"):
            data = open_data(config.validate())
        with locked(Path(config.output_dir)):
            return _train(config, data, device, stop, command or {})


def _train(config: RunConfig, data: Data, device: torch.device, stop: StopRequest, command: dict[str, Any]) -> Path:
    """From the opened data on: tower, engine, loop, export."""
    with phase("checking the data"):
        check_data(config, data)
    if rank() == 0:
        for line in notes(config, data.sources[0], device):
            print(line, file=sys.stderr)
    config = with_order(config)
    config = dataclasses.replace(config, dual=with_llm_width(config.dual, data.caches[0].width))
    dual = build_dual(config.tower, config.dual, seed=config.train.seed)
    if config.heads.target == "clip_text":
        load_clip_heads(dual, config.tower.path)
    check_patch_layers(dual, config.loss)
    images = ImageConfig.from_preprocessor(preprocessor_config(dual.tower))
    check_shared_memory(load_plans(config, images.size, data.caches[0].width, world_size()), local_world_size())
    trained = trained_parameters(dual, config.optim)
    run = open_run(config, data, hidden_size=dual.tower.config.hidden_size)
    run = dataclasses.replace(run, command=command)
    resumed = run.find_checkpoint()
    if resumed is not None:
        load_weights(dual, resumed.weights, where=resumed.path)
    check_weights(dual, config, resumed)
    run.check_space(dual, trained, twin=config.loss.needs_reference)
    curve: list[FitLine] = []
    if resumed is None and config.heads.steps:
        run.record(run.new_state())
        with phase("heads"):
            curve = fit(dual, data, images, config, config.heads, device, stop, run.folder / UNFINISHED_HEADS)
    # before the engine, which partitions the weights under ZeRO-3
    twin = Twin(dual, decay=config.distill.twin_decay) if config.loss.needs_reference else None
    evaluate = evaluation(dual, data, images, config)
    before = evaluate if config.train.eval_on_start else None
    if before is not None and not (config.heads.steps or config.tower.keep_heads):
        scored = None if resumed is not None else before
        before, curve = None, []
        if scored is not None:
            before, curve = measured_before(dual, data, images, config, scored, device, stop)
    prepare(dual, config, device)
    if twin is not None:
        use_fastest_attention(twin.module.tower, device, bf16=config.train.precision == "bf16")
    engine = run.make_engine(dual, trained, resumed)
    if twin is not None:
        twin.attach(engine, resumed.twin if resumed is not None else {})
    start = run.start_state(resumed)
    loader = make_batches(config, data, images, start.samples)
    state = run.train_to_end(
        engine,
        start,
        step=TowerStep(
            engine,
            weighted_terms(config.loss),
            seed=config.train.seed,
            text_noise=config.dual.input_noise > 0,
            normalize=Normalize(images, engine.device),
            total_samples=run.total_steps * config.train.global_batch,
            twin=twin,
            patch_layers=config.loss.patch_layers,
        ),
        batches=iter(loader),
        queue=loader.queue if config.train.dataloader_num_workers else None,
        evaluate=evaluate,
        before=before,
        heads=curve,
        stop=stop,
        average=moving_average(engine, config, resumed),
        twin=twin,
    )
    if rank() == 0:
        (run.folder / UNFINISHED_HEADS).unlink(missing_ok=True)
    run.write_result(lambda: export_towers(config, state.step))
    return run.folder / TOWER


def fit(
    dual: DualEncoder,
    data: Data,
    images: ImageConfig,
    config: RunConfig,
    heads: HeadsConfig,
    device: torch.device,
    stop: StopRequest,
    unfinished: Path | None = None,
) -> list[FitLine]:
    """Fit the heads on the frozen tower, in place; returns the curve."""
    loaded()
    return fit_heads(
        dual,
        data.sources,
        data.caches,
        images,
        heads,
        config.loss,
        device=device,
        seed=config.train.seed,
        bf16=config.train.precision == "bf16",
        caption_weights=config.data.kind_weights,
        clip_caches=data.clip_caches,
        workers=config.train.dataloader_num_workers,
        logging_steps=config.train.logging_steps,
        stop=stop,
        unfinished=unfinished,
    )


def measured_before(
    dual: DualEncoder,
    data: Data,
    images: ImageConfig,
    config: RunConfig,
    evaluate: Evaluate,
    device: torch.device,
    stop: StopRequest,
) -> tuple[Evaluate, list[FitLine]]:
    """Scores of a start tower whose run does not fit its heads first: with heads that are fitted for them alone.

    The run's own heads are put back bit for bit. Also returns the curve of the fit.
    """
    own = {name: parameter.detach().clone() for name, parameter in head_parameters(dual)}
    with phase("heads of the scores before training"):
        curve = fit(dual, data, images, config, FITTED_FOR_SCORES, device, stop)
        scores = evaluate()
    with torch.no_grad():
        for name, parameter in head_parameters(dual):
            parameter.copy_(own[name])
    return (lambda: scores), curve


def open_run(config: RunConfig, data: Data, *, hidden_size: int) -> TrainingRun:
    """The run's DeepSpeed configuration and what its checkpoints are compared with."""
    plan, deepspeed = plan_engine(
        config, config.train, config.optim, samples=data.samples, world=world_size(), hidden_size=hidden_size
    )
    learned_from = {"teacher": data.teacher.fingerprint, "samples": data.samples}
    if data.clip_caches:
        learned_from["clip"] = data.clip_caches[0].fingerprint
    return TrainingRun(
        config=config,
        config_hash=config.hash,
        train=config.train,
        optim=config.optim,
        run_settings={**dataclasses.asdict(config), **learned_from},
        teacher=dataclasses.asdict(data.teacher),
        total_steps=plan.total_steps,
        deepspeed=deepspeed,
        data=data.digests,
    )


def prepare(dual: DualEncoder, config: RunConfig, device: torch.device) -> None:
    """Choose the tower's attention kernel, set gradient checkpointing and compilation."""
    use_fastest_attention(dual.tower, device, bf16=config.train.precision == "bf16")
    if config.train.gradient_checkpointing:
        enable_gradient_checkpointing(dual.tower)
    if config.train.torch_compile:
        dual.tower.compile()


def make_batches(config: RunConfig, data: Data, images: ImageConfig, position: int) -> PairLoader:
    """This rank's rows of the global batches, from sample number ``position`` of the run on."""
    local_batch, micro_batch, _ = config.train.rows(world_size())
    dataset = PairDataset(
        data.sources,
        data.caches,
        images,
        config.data.augment,
        seed=config.train.seed,
        caption_weights=config.data.kind_weights,
        captions_per_image=config.data.captions_per_image,
        one_source_batch=config.train.global_batch if config.data.one_source_per_batch else 0,
    )
    return make_loader(
        dataset,
        local_batch=local_batch,
        micro_batch=micro_batch,
        position=position,
        rank=rank(),
        world=world_size(),
        workers=config.train.dataloader_num_workers,
        prefetch_mb=config.train.dataloader_prefetch_mb,
        max_broken=config.train.max_broken,
        pin_memory=torch.cuda.is_available(),
        whole_shards=rank() == 0 and world_size() == local_world_size(),
    )


def moving_average(engine: Engine, config: RunConfig, resumed: Loaded | None) -> MovingAverage | None:
    """The moving average of the weights, None if the run has none."""
    if not config.train.ema_decay:
        return None
    values = resumed.averages if resumed is not None else None
    updates = resumed.state.step if resumed is not None else 0
    return MovingAverage(engine, config.train.ema_decay, updates=updates, values=values)


def evaluation(dual: DualEncoder, data: Data, images: ImageConfig, config: RunConfig) -> Evaluate | None:
    """Recall on the held-out split, by all ranks together; None without a split."""
    source, cache = data.validation, data.validation_cache
    if source is None or cache is None:
        return None

    def evaluate() -> dict[str, float]:
        report = evaluate_retrieval(dual, source, cache, images, config.evaluation, all_ranks=True, quiet=True)
        return report.metrics()

    return evaluate


def export_towers(config: RunConfig, step: int) -> None:
    """Export the checkpoint of the last step, and its moving average if there is one."""
    folder = Path(config.output_dir)
    last = Checkpoints(folder, keep=0).path(step).name  # by its name: no fallback to an older one
    export_run(folder, folder / TOWER, checkpoint=last, replace=True)
    if config.train.ema_decay:
        export_run(folder, folder / TOWER_EMA, checkpoint=last, averaged=True, replace=True)
