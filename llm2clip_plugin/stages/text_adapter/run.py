"""The text adapter's training assembled: two caches of captions in, a tower with an inherited text side out."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.console import phase
from llm2clip_plugin.data.loader import PairLoader, make_loader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.stages.run import TrainingRun, plan_engine, training_ranks
from llm2clip_plugin.stages.text_adapter.config import AdapterConfig
from llm2clip_plugin.stages.text_adapter.opening import Data, held_out_rows, open_data
from llm2clip_plugin.text.teacher import InheritedSpace, InheritStep, scores
from llm2clip_plugin.train.checkpoint import TrainState, load, load_weights, verify
from llm2clip_plugin.train.config import OptimConfig
from llm2clip_plugin.train.distributed import on_first_rank, rank, world_size
from llm2clip_plugin.train.errors import StopRequest, stop_requests
from llm2clip_plugin.train.guard import check_finite, locked
from llm2clip_plugin.train.loop import Evaluate
from llm2clip_plugin.train.losses.base import weighted_terms
from llm2clip_plugin.train.optim import Trained, is_vector
from llm2clip_plugin.vision.dual import DualEncoder, load_dual
from llm2clip_plugin.vision.export import export_tower

TOWER = "tower"


def train_text_adapter(config: AdapterConfig, *, command: dict[str, Any] | None = None) -> Path:
    """Train a text adapter; returns the tower directory that has it.

    The same call resumes. Raises ValueError, FileNotFoundError or ContractError for what the user can correct.
    ``command``: see run_files.started_by; recorded in run.json.
    """
    with stop_requests() as stop, training_ranks(config.train) as device:
        with phase("opening the data"):
            data = open_data(config.validate())
        with locked(Path(config.output_dir)):
            return _train(config, data, device, stop, command or {})


def _train(config: AdapterConfig, data: Data, device: torch.device, stop: StopRequest, command: dict[str, Any]) -> Path:
    """From the opened data on: adapter, engine, loop, export."""
    if rank() == 0:
        print(f"text features of {data.clip.llm}, from embeddings of {data.teacher.llm}", flush=True)
    dual = with_adapter(config, data)
    assert dual.text_adapter is not None
    module = InheritedSpace(dual.text_adapter).train()
    trained = adapter_parameters(module, config.optim)
    run = dataclasses.replace(open_run(config, data), command=command)
    resumed = run.find_checkpoint()
    if resumed is not None:
        load_weights(module, resumed.weights, where=resumed.path)
    on_first_rank(lambda: check_finite(dual, config.start if resumed is None else resumed.path))
    engine = run.make_engine(module, trained, resumed)
    start = run.start_state(resumed)
    evaluate = evaluation(module, data, engine.device)
    loader = make_batches(config, data, start.samples)
    state = run.train_to_end(
        engine,
        start,
        step=InheritStep(
            engine,
            weighted_terms(config.loss),
            seed=config.train.seed,
            total_samples=run.total_steps * config.train.global_batch,
        ),
        batches=iter(loader),
        queue=loader.queue if config.train.dataloader_num_workers else None,
        evaluate=evaluate,
        before=evaluate if config.train.eval_on_start else None,
        stop=stop,
    )
    run.write_result(lambda: write_tower(run, config, dual, data, state))
    return run.folder / TOWER


def adapter_parameters(module: InheritedSpace, optim: OptimConfig) -> list[Trained]:
    """Every parameter, at one learning rate."""
    return [
        Trained(name=name, parameter=parameter, lr=optim.lr, decay=not is_vector(parameter))
        for name, parameter in module.named_parameters()
    ]


def with_adapter(config: AdapterConfig, data: Data) -> DualEncoder:
    """The imported CLIP with a new text adapter.

    Raises ValueError if the tower has an adapter already, no projection, or another width than the CLIP's features.
    """
    own, _ = load_dual(config.start)
    width = data.training[0].clip_cache.width
    if own.text_adapter is not None:
        raise ValueError(
            f"{config.start} has a text adapter already; give the CLIP itself, as llm2clip import writes it"
        )
    if own.config.projection_dim != width:
        raise ValueError(
            f"{config.start} has image features of width {own.config.projection_dim}, but the text features of "
            f"{data.clip.llm} have {width}; embed the captions with the text tower of the same CLIP"
        )
    shape = config.adapter
    changed = dataclasses.replace(
        own.config,
        llm_width=data.training[0].cache.width,
        adapter=shape.kind,
        adapter_blocks=shape.blocks,
        adapter_expansion=shape.expansion,
        input_scale=shape.input_scale,
    )
    torch.manual_seed(config.train.seed)
    dual = DualEncoder(own.tower, changed)
    dual.load_state_dict(own.state_dict(), strict=False)  # everything but the adapter
    return dual


def open_run(config: AdapterConfig, data: Data) -> TrainingRun:
    """The run's DeepSpeed configuration and what its checkpoints are compared with."""
    width = data.training[0].cache.width
    plan, deepspeed = plan_engine(
        config, config.train, config.optim, samples=data.samples, world=world_size(), hidden_size=width
    )
    learned_from = {"teacher": data.teacher.fingerprint, "clip": data.clip.fingerprint, "samples": data.samples}
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


def make_batches(config: AdapterConfig, data: Data, position: int) -> PairLoader:
    """This rank's captions of the global batches, from sample number ``position`` of the run on."""
    local_batch, micro_batch, _ = config.train.rows(world_size())
    dataset = PairDataset(
        [item.source for item in data.training],
        [item.cache for item in data.training],
        None,
        seed=config.train.seed,
        targets=[item.clip_cache for item in data.training],
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
    )


def evaluation(module: InheritedSpace, data: Data, device: torch.device) -> Evaluate | None:
    """How near the adapter's space is to the CLIP's on held-out captions, on every rank alike; None without any."""
    if data.held_out is None:
        return None
    embeddings, targets = held_out_rows(data.held_out)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        module.eval()
        features = torch.cat([module(part.to(device)) for part in embeddings.split(1024)])
        module.train()
        return scores(features, targets.to(device))

    return evaluate


def write_tower(run: TrainingRun, config: AdapterConfig, dual: DualEncoder, data: Data, state: TrainState) -> None:
    """Write the CLIP's tower and projection with the last checkpoint's adapter."""
    last = run.checkpoints.path(state.step)  # the loop ends with a checkpoint
    verify(last, moments=False)
    exported = DualEncoder(dual.tower, dual.config)
    exported.load_state_dict({**dual.state_dict(), **load(last, moments=False).weights})
    export_tower(
        exported,
        run.folder / TOWER,
        origin=config.start,
        teacher=dataclasses.asdict(data.teacher),
        training={
            "inherited_from": data.clip.llm,
            "steps": state.step,
            "samples": state.samples,
            "global_batch": config.train.global_batch,
            "data": [Path(path).name for path in config.data.path],
            "config_hash": config.hash,
        },
        metrics=state.metrics,
        replace=True,
    )
