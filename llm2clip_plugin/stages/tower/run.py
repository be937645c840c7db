"""Stage 2 assembled: captioned images and a cache in, a trained and exported tower out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.contracts import RunRecord, TeacherIdentity
from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import PairDataset, make_loader
from llm2clip_plugin.data.sampler import epoch_draws
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.data.sources.remote import is_url
from llm2clip_plugin.data.sources.shards import data_folder
from llm2clip_plugin.evaluate.measure import evaluate_retrieval
from llm2clip_plugin.stages.tower.config import RunConfig, from_plain, refuse_changes
from llm2clip_plugin.train.checkpoint import FOLDER, RESUME_AUTO, Checkpoints, Loaded, TrainState, load
from llm2clip_plugin.train.deepspeed_config import EnginePlan, complete, read_deepspeed_json
from llm2clip_plugin.train.distributed import barrier, rank, world_size
from llm2clip_plugin.train.ema import MovingAverage
from llm2clip_plugin.train.engine import Engine, start_ranks
from llm2clip_plugin.train.heads import fit_heads
from llm2clip_plugin.train.loop import LoopParts, run_loop
from llm2clip_plugin.train.losses.config import weighted_terms
from llm2clip_plugin.train.model import build_dual, trained_parameters, with_llm_width
from llm2clip_plugin.train.optim import parameter_groups
from llm2clip_plugin.train.step import TowerStep
from llm2clip_plugin.train.stopping import StopRequest, stop_requests
from llm2clip_plugin.vision.attention import use_fastest_attention
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower, library_versions
from llm2clip_plugin.vision.towers import preprocessor_config

TOWER, TOWER_EMA = "tower", "tower-ema"


def train_tower(config: RunConfig, command: Sequence[str] = ()) -> Path | None:
    """Train a tower; returns the exported tower's directory, None if the run was stopped or only planned.

    ``command``: options of the command line, for the commands that a dry run prints.
    The same call goes on from the newest checkpoint of ``config.output_dir``. Raises ValueError,
    FileNotFoundError or ContractError for what the user can mend, NonFiniteLossError for a loss that is no number.
    """
    if config.dry_run:
        from llm2clip_plugin.stages.tower.plan import tower_plan

        if os.environ.get("RANK", "0") == "0":
            print(tower_plan(config, command), flush=True)
        return None
    device = start_ranks()
    data = open_data(config.validate())
    with stop_requests() as stop:
        return _train(config, data, device, stop)


def _train(config: RunConfig, data: Data, device: torch.device, stop: StopRequest) -> Path | None:
    """From the opened data on: tower, engine, loop, export."""
    config = dataclasses.replace(config, dual=with_llm_width(config.dual, data.caches[0].width))
    dual = build_dual(config.tower, config.dual, seed=config.train.seed)
    images = ImageConfig.from_preprocessor(preprocessor_config(dual.tower))
    trained = trained_parameters(dual, config.optim)
    plan = engine_plan(config, samples=data.samples, hidden_size=dual.tower.config.hidden_size, world=world_size())
    ds_config = complete(read_deepspeed_json(config.deepspeed), plan, where=config.deepspeed or "the run")
    checkpoints = Checkpoints(Path(config.output_dir), keep=config.train.save_total_limit)
    identity = {**dataclasses.asdict(config), "teacher": data.caches[0].teacher.fingerprint, "samples": data.samples}
    resumed = resume(checkpoints, config, identity)
    if resumed is not None:
        dual.load_state_dict(resumed.weights)
    elif config.heads.steps:
        fit_heads(
            dual,
            data.sources,
            data.caches,
            images,
            config.heads,
            config.loss,
            device=device,
            seed=config.train.seed,
            bf16=config.train.precision == "bf16",
        )
    prepare(dual, config, device)
    adam = {"lr": config.optim.lr, "betas": config.optim.betas, "eps": config.optim.eps}
    engine = Engine(dual, parameter_groups(trained, config.optim.weight_decay), adam, ds_config)
    state = start_state(config, identity) if resumed is None else resumed.state
    if resumed is not None:
        engine.restore(resumed.weights, resumed.moments, vars(state))
    record(config, state, data.teacher)
    state = run_loop(
        LoopParts(
            step=TowerStep(
                engine,
                weighted_terms(config.loss),
                seed=config.train.seed,
                text_noise=config.dual.input_noise > 0,
            ),
            batches=batches(config, data, images, state.samples),
            engine=engine,
            average=moving_average(engine, config, resumed),
            checkpoints=checkpoints,
            evaluate=evaluation(dual, data, images, config),
            train=config.train,
            optim=config.optim,
            total_steps=plan.total_steps,
            run_folder=Path(config.output_dir),
            state=state,
            stop=stop,
        )
    )
    return finish(config, state, data, plan.total_steps)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Opened sources with their caches, checked against each other."""

    sources: list[Source]
    caches: list[EmbeddingCache]
    validation: Source | None
    validation_cache: EmbeddingCache | None

    @property
    def samples(self) -> int:
        """Training samples of one epoch, over all sources: a source's weight x its size."""
        return sum(epoch_draws(list(map(len, self.sources)), [source.config.weight for source in self.sources]))

    @property
    def teacher(self) -> TeacherIdentity:
        """Whose embeddings the caches hold."""
        return self.caches[0].teacher


def open_data(config: RunConfig) -> Data:
    """Open everything; ContractError if a cache is another teacher's than the first, or doesn't fit its source."""
    paths = config.data.cache or ("",) * len(config.data.path)
    sources, caches = [], []
    teacher = None
    for item, path in zip(config.data.sources, paths, strict=True):
        source, cache = open_pair(item, path, teacher)
        teacher = cache.fingerprint
        sources.append(source)
        caches.append(cache)
    held_out = config.data.held_out
    pair = open_pair(held_out, config.data.validation_cache, teacher) if held_out else (None, None)
    return Data(sources=sources, caches=caches, validation=pair[0], validation_cache=pair[1])


def open_pair(config: SourceConfig, cache_path: str, teacher: str | None) -> tuple[Source, EmbeddingCache]:
    """A source and its cache, checked against each other and against the teacher's fingerprint."""
    if is_url(config.path) and not cache_path:  # before anything is downloaded
        raise ValueError(
            f"{config.path} is not a local folder: say where its embedding cache is with --data.cache DIR "
            "(--data.validation-cache DIR for the held-out split)"
        )
    source = open_source(config)
    cache = EmbeddingCache.open(cache_path or find_cache(config.path), expect_fingerprint=teacher)
    cache.check(source)
    return source, cache


def find_cache(source: str) -> str:
    """The one ``embeddings-*`` folder beside the data; FileNotFoundError or ValueError if there is not just one."""
    folder = data_folder(source)
    found = sorted(str(path.parent) for path in folder.glob("embeddings-*/manifest.json"))
    if not found:
        raise FileNotFoundError(f"no embedding cache (embeddings-*) in {folder}; make one: llm2clip embed {source} ...")
    if len(found) > 1:
        raise ValueError(f"{folder} holds the caches {', '.join(found)}; say which with --data.cache")
    return found[0]


def engine_plan(config: RunConfig, *, samples: int, hidden_size: int, world: int) -> EnginePlan:
    """The run's decisions in DeepSpeed's terms, for a tower ``hidden_size`` wide."""
    _, micro, accumulation = config.train.rows(world)
    steps = config.train.steps(samples)
    return EnginePlan(
        global_batch=config.train.global_batch,
        micro_batch=micro,
        accumulation=accumulation,
        precision=config.train.precision,
        max_grad_norm=config.optim.max_grad_norm,
        lr=config.optim.lr,
        betas=config.optim.betas,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        schedule=config.optim.schedule,
        warmup_steps=config.optim.warmup(steps),
        total_steps=steps,
        hidden_size=hidden_size,
        report_to=config.train.report_to,
        output_dir=config.output_dir,
        run_name=Path(config.output_dir).name,
    )


def resume(checkpoints: Checkpoints, config: RunConfig, identity: dict[str, Any]) -> Loaded | None:
    """The checkpoint to go on from, None for a new run; ValueError if its settings are others."""
    path = checkpoints.find(config.resume)
    if path is None:
        return None
    loaded = load(path)
    refuse_changes(loaded.state.config, identity, config.allow_changed, where=str(path))
    return dataclasses.replace(
        loaded, state=dataclasses.replace(loaded.state, config=identity, config_hash=config.hash)
    )


def start_state(config: RunConfig, identity: dict[str, Any]) -> TrainState:
    """Nothing consumed yet."""
    return TrainState(step=0, samples=0, config=identity, config_hash=config.hash, seed=config.train.seed)


def prepare(dual: DualEncoder, config: RunConfig, device: torch.device) -> None:
    """Attention, gradient checkpointing and compilation of the tower."""
    use_fastest_attention(dual.tower, device, bf16=config.train.precision == "bf16")
    if config.train.gradient_checkpointing:
        dual.tower.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if config.train.torch_compile:
        dual.tower.compile()


def batches(config: RunConfig, data: Data, images: ImageConfig, position: int) -> Iterator[dict[str, Any]]:
    """This rank's rows of the global batches, from ``position`` on."""
    local, _, _ = config.train.rows(world_size())
    dataset = PairDataset(data.sources, data.caches, images, config.data.augment, seed=config.train.seed)
    return iter(
        make_loader(
            dataset,
            local_batch=local,
            position=position,
            rank=rank(),
            world=world_size(),
            workers=config.train.dataloader_num_workers,
            max_broken=config.train.max_broken,
            pin_memory=torch.cuda.is_available(),
        )
    )


def moving_average(engine: Engine, config: RunConfig, resumed: Loaded | None) -> MovingAverage | None:
    """The moving average of the weights, where one is kept."""
    if not config.train.ema_decay:
        return None
    values = resumed.averages if resumed is not None else None
    updates = resumed.state.step if resumed is not None else 0
    return MovingAverage(engine, config.train.ema_decay, updates=updates, values=values)


def evaluation(
    dual: DualEncoder, data: Data, images: ImageConfig, config: RunConfig
) -> Callable[[], dict[str, float]] | None:
    """Recall on the held-out split, by all ranks together; None without one."""
    source, cache = data.validation, data.validation_cache
    if source is None or cache is None:
        return None

    def evaluate() -> dict[str, float]:
        report = evaluate_retrieval(dual, source, cache, images, config.evaluation, all_ranks=True, quiet=True)
        return report.metrics()

    return evaluate


def record(config: RunConfig, state: TrainState, teacher: TeacherIdentity, *, finished: bool = False) -> None:
    """``run.json``: the configuration and where the run stands; rank 0 writes."""
    if rank() == 0:
        RunRecord(
            config=dataclasses.asdict(config),
            config_hash=config.hash,
            teacher=dataclasses.asdict(teacher),
            step=state.step,
            samples=state.samples,
            finished=finished,
            metrics=state.metrics,
            versions=library_versions(),
        ).write(Path(config.output_dir) / RunRecord.FILE)


def finish(config: RunConfig, state: TrainState, data: Data, total_steps: int) -> Path | None:
    """Note where the run stands; export the tower if it is at its end."""
    finished = state.step >= total_steps
    record(config, state, data.teacher, finished=finished)
    folder = Path(config.output_dir)
    if finished and rank() == 0:
        export_run(folder, folder / TOWER, replace=True)
        if config.train.ema_decay:
            export_run(folder, folder / TOWER_EMA, averaged=True, replace=True)
    barrier()
    return folder / TOWER if finished else None


def export_run(run: Path, output: Path, *, checkpoint: str = "", averaged: bool = False, replace: bool = False) -> Path:
    """Write a run's checkpoint (the newest, unless ``checkpoint`` names or points to one) as a tower directory."""
    record_ = RunRecord.read(run / RunRecord.FILE)
    config = from_plain(RunConfig, record_.config, where=str(run / RunRecord.FILE))
    inside = run / FOLDER / checkpoint
    path = Checkpoints(run, keep=0).find(str(inside) if checkpoint and inside.is_dir() else checkpoint or RESUME_AUTO)
    if path is None:
        raise FileNotFoundError(f"{run} holds no checkpoint yet")
    loaded = load(path)
    if averaged and not loaded.averages:
        raise ValueError(f"{path} holds no moving average: the run had --train.ema-decay 0")
    dual = build_dual(config.tower, config.dual, seed=config.train.seed)
    dual.load_state_dict({**loaded.weights, **(loaded.averages if averaged else {})})
    state = loaded.state
    export_tower(
        dual,
        output,
        origin=config.tower.path,
        teacher=record_.teacher,
        training={
            "steps": state.step,
            "samples": state.samples,
            "global_batch": config.train.global_batch,
            "data": [Path(path).name for path in config.data.path],
            "config_hash": state.config_hash,
            "moving_average": averaged,
        },
        metrics={} if averaged else state.metrics,
        replace=replace,
    )
    return output
