"""The training loop: steps, learning rate, checkpoints, evaluation, signals; independent of model and data."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from llm2clip_plugin.data.shared_memory import PREFETCH_MB
from llm2clip_plugin.phases import phase
from llm2clip_plugin.train.checkpoint import TrainState
from llm2clip_plugin.train.deepspeed_config import Precision, ReductionType
from llm2clip_plugin.train.device import Tf32
from llm2clip_plugin.train.distributed import DDP_TIMEOUT, on_first_rank, rank, sum_over_ranks, world_size
from llm2clip_plugin.train.ema import MovingAverage
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.errors import NonFiniteLossError
from llm2clip_plugin.train.optim import OptimConfig, lr_factor, set_lr
from llm2clip_plugin.train.progress import peak_memory
from llm2clip_plugin.train.reports import Queue, Reports
from llm2clip_plugin.train.run_checkpoints import Checkpoints
from llm2clip_plugin.train.saving import Saver
from llm2clip_plugin.train.step import NAMED_KEYS, Batch
from llm2clip_plugin.train.stopping import StopRequest
from llm2clip_plugin.train.timing import timed
from llm2clip_plugin.train.watchdog import STRAGGLER_SECONDS

StepFunction = Callable[[Batch], tuple[float, dict[str, float]]]
Evaluate = Callable[[], dict[str, float]]
Monitor = Literal["tensorboard", "wandb", "csv"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch size, precision, checkpoints and logging of a run."""

    global_batch: int = 4096  # image-caption pairs per optimizer step, over all ranks; also the negatives
    micro_batch: int = 0  # pairs per forward pass on one rank; fewer than its share: gradient caching. 0: its share
    num_train_epochs: float = 4.0  # passes over the data; used if max_steps is 0
    max_steps: int = 0  # optimizer steps; 0 or -1: as many as num_train_epochs makes
    precision: Precision = "fp32"  # fp32 | bf16 | fp16 (of the weights; the optimizer runs in fp32)
    tf32: Tf32 = "auto"  # TF32 for products of fp32 tensors on GPUs: on | off | auto (not with precision fp32)
    communication_data_type: ReductionType = ""  # in which gradients are reduced: fp32 | bf16 | fp16; "": DeepSpeed's
    seed: int = 0  # of the data's order, augmentation, noise, initial heads
    gradient_checkpointing: bool = False  # recompute the tower's blocks in the backward pass: less memory, slower
    torch_compile: bool = False  # torch.compile the tower
    ema_decay: float = 0.0  # exponential moving average of the weights, also exported; 0: none
    save_steps: int = 0  # steps between checkpoints; 0: only by time
    save_minutes: float = 15.0  # minutes between checkpoints; 0: only by steps
    save_total_limit: int = 2  # checkpoints kept; 0: all
    save_fallback_dir: str = ""  # where the last checkpoint is written if output_dir fails (disk full); "": nowhere
    eval_steps: int = 0  # steps between evaluations on the held-out split; 0: only at the end
    eval_on_start: bool = True  # evaluate before step 1 too: the scores that the run's are compared with
    logging_steps: int = 1  # steps between lines of metrics.jsonl
    report_to: tuple[Monitor, ...] = ()  # DeepSpeed's monitors: tensorboard, wandb, csv
    profile_steps: int = 0  # steps traced by torch.profiler into output_dir/profile, after 5 others; 0: none
    profile_all_ranks: bool = False  # trace every rank, not rank 0 alone
    dataloader_num_workers: int = 0  # processes per rank that decode images or tokenize pairs
    dataloader_prefetch_mb: int = PREFETCH_MB  # 10^6 bytes of /dev/shm that these fill ahead, for each rank
    max_broken: float = 0.01  # fraction of unreadable samples above which the run stops
    ddp_timeout: float = DDP_TIMEOUT  # seconds that a rank waits for the others in a collective before the run fails
    straggler_seconds: float = (
        STRAGGLER_SECONDS  # a rank without progress for so long is named, with its phase; 0: never
    )

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"unknown train.precision {self.precision!r}; known: {', '.join(get_args(Precision))}")
        if self.tf32 not in get_args(Tf32):
            raise ValueError(f"unknown train.tf32 {self.tf32!r}; known: {', '.join(get_args(Tf32))}")
        if self.communication_data_type not in get_args(ReductionType):
            raise ValueError(
                f"unknown train.communication_data_type {self.communication_data_type!r}; known: "
                f"{', '.join(filter(None, get_args(ReductionType)))}, or leave it empty"
            )
        if unknown := sorted(set(self.report_to) - set(get_args(Monitor))):
            raise ValueError(f"unknown train.report_to {unknown}; known: {', '.join(get_args(Monitor))}")
        if self.global_batch < 2 or self.micro_batch < 0:
            raise ValueError(
                f"train.global_batch {self.global_batch} must be >= 2, micro_batch {self.micro_batch} >= 0"
            )
        if self.max_steps <= 0 and self.num_train_epochs < 0:
            raise ValueError(f"train.num_train_epochs {self.num_train_epochs} must not be negative")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.max_broken <= 1:
            raise ValueError(
                f"train.ema_decay {self.ema_decay} must be in [0, 1), max_broken {self.max_broken} in [0, 1]"
            )
        if self.dataloader_prefetch_mb < 1:
            raise ValueError(f"train.dataloader_prefetch_mb {self.dataloader_prefetch_mb} must be at least 1")
        if self.ddp_timeout <= 0 or self.straggler_seconds < 0:
            raise ValueError(
                f"train.ddp_timeout {self.ddp_timeout} must be above 0, straggler_seconds {self.straggler_seconds} >= 0"
            )
        counts = ("save_steps", "save_minutes", "save_total_limit", "eval_steps", "profile_steps")
        for name in (*counts, "dataloader_num_workers"):
            if vars(self)[name] < 0:
                raise ValueError(f"train.{name} {vars(self)[name]} must not be negative")
        if self.logging_steps < 1:
            raise ValueError(f"train.logging_steps {self.logging_steps} must be at least 1")

    def rows(self, world: int) -> tuple[int, int, int]:
        """(local batch, micro-batch, micro-batches a step) on ``world`` ranks; ValueError suggests a batch."""
        local, rest = divmod(self.global_batch, world)
        micro = self.micro_batch or local
        if not rest and local % micro == 0:
            return local, micro, local // micro
        unit = world * min(micro, local) or world
        fits = [f"--global-batch {max(unit, self.global_batch // unit * unit)}"] if rest or micro < local else []
        if not rest:
            divisors = [size for size in range(1, min(micro, local) + 1) if local % size == 0]
            fits.append(f"--micro-batch {divisors[-1]}")
        shares = f"{world} ranks" + (f" x train.micro_batch {self.micro_batch}" if self.micro_batch else "")
        raise ValueError(
            f"train.global_batch {self.global_batch} is not a multiple of {shares}; try {' or '.join(fits)}"
        )

    @property
    def has_steps(self) -> bool:
        """Whether there is a step to make."""
        return self.max_steps > 0 or self.num_train_epochs > 0

    def steps(self, samples: int) -> int:
        """Optimizer steps of the run over ``samples`` samples; 0 for 0 epochs."""
        if self.max_steps > 0 or not self.has_steps:
            return max(0, self.max_steps)
        return max(1, round(self.num_train_epochs * samples / self.global_batch))


@dataclass(frozen=True, kw_only=True)
class LoopParts:
    """Everything that ``run_loop`` uses."""

    step: StepFunction
    batches: Iterator[Batch]
    engine: Engine
    average: MovingAverage | None
    checkpoints: Checkpoints
    evaluate: Evaluate | None  # called on every rank
    before: Evaluate | None = None  # the same before step 1, in a new run
    train: TrainConfig
    optim: OptimConfig
    total_steps: int
    run_folder: Path
    state: TrainState  # of the checkpoint resumed from, or a new run's
    stop: StopRequest
    queue: Queue | None = None  # of the loader; called between batches


def run_loop(parts: LoopParts) -> TrainState:
    """Train to the end, or until a stop is requested; returns the final state, which is saved.

    Raises NonFiniteLossError on every rank, before the update, and OSError if the final state cannot be saved; the last
    complete checkpoint is unchanged.
    """
    with Reports(
        parts.engine,
        parts.run_folder,
        parts.state,
        total_steps=parts.total_steps,
        global_batch=parts.train.global_batch,
        logging_steps=parts.train.logging_steps,
        queue=parts.queue,
        profile_steps=parts.train.profile_steps if parts.train.profile_all_ranks or rank() == 0 else 0,
    ) as reports:
        fallback = parts.train.save_fallback_dir
        with Saver(
            parts.checkpoints,
            parts.engine,
            parts.average,
            fallback=Path(fallback) / parts.run_folder.name if fallback else None,
            note=reports.note,
            event=reports.event,
        ) as saver:
            try:
                state, stopped = _steps(parts, reports, saver)
                saver.finish()
            except (Exception, KeyboardInterrupt) as error:
                reports.failed(error)
                raise
        if stopped:
            reports.stopped(state, parts.stop.reason)
    return state


def _steps(parts: LoopParts, reports: Reports, saver: Saver) -> tuple[TrainState, bool]:
    """The state in which training ended, whose checkpoint is being written, and whether a stop was requested."""
    state, saved_at, save_due = parts.state, time.monotonic(), False
    stop = _any_rank(parts, bool(parts.stop))[0]
    if parts.before is not None and state.step == 0 and not state.before and not stop:
        state = _evaluate_start(parts.before, parts, state, reports)
    if stop or state.step >= parts.total_steps:  # no step to make: requested before the first, or resumed at the end
        if not on_first_rank(lambda: parts.checkpoints.path(state.step).is_dir()):  # resumed from another folder
            with phase("gathering the checkpoint"):
                saver.save(state, last=True)
        if stop:
            return state, True
    if state.evaluated is not None and state.evaluated < state.step and _evaluation_due(parts, state):
        state = _evaluate(parts, state, reports, saver)  # killed between a checkpoint and its evaluation
    while state.step < parts.total_steps:
        started = time.perf_counter()
        reports.timer.start()
        batch = next(parts.batches)
        waited = time.perf_counter() - started
        reports.timer.switch("forward")
        with reports.count_flops():
            state, values = _one_step(parts, state, batch)
        reports.timer.stop()
        seconds = time.perf_counter() - started
        state = replace(state, seconds=state.seconds + seconds)
        values |= {"samples_per_second": parts.train.global_batch / seconds, "wait_share": waited / seconds}
        minutes_over = 0 < parts.train.save_minutes * 60 <= time.monotonic() - saved_at
        stop, due, busy = _any_rank(parts, bool(parts.stop), minutes_over or saver.retry_due, saver.busy)
        last = stop or state.step == parts.total_steps
        reports.step(state, seconds, values, always=last)
        save_due = save_due or due or _every(parts.train.save_steps, state.step)
        if last or (save_due and not busy):  # a save that comes while one is written waits for it
            with phase("gathering the checkpoint"):
                saver.save(state, last=last)
            reports.progress.values["save_seconds"] = saver.waited
            saved_at, save_due = time.monotonic(), False
        if stop:
            return state, True
        if _evaluation_due(parts, state):
            state = _evaluate(parts, state, reports, saver)
    return state, False


def _evaluation_due(parts: LoopParts, state: TrainState) -> bool:
    done = state.step == parts.total_steps
    return parts.evaluate is not None and (done or _every(parts.train.eval_steps, state.step))


def _evaluate_start(before: Evaluate, parts: LoopParts, state: TrainState, reports: Reports) -> TrainState:
    """Evaluate before step 1; in a run without steps these are its scores."""
    state = replace(state, before=before())
    reports.scores(state, state.before)
    return state if parts.total_steps else replace(state, metrics=state.before, evaluated=0)


def _evaluate(parts: LoopParts, state: TrainState, reports: Reports, saver: Saver) -> TrainState:
    """Evaluate, after the checkpoint of the same step, which gets the scores."""
    assert parts.evaluate is not None
    state = replace(state, metrics=parts.evaluate(), evaluated=state.step)
    reports.scores(state, state.metrics)
    saver.record_metrics(state)
    return state


def _one_step(parts: LoopParts, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, float]]:
    """Learning rate, update, moving average; NonFiniteLossError if the loss or the gradient is not finite."""
    factor = lr_factor(state.step, parts.total_steps, parts.optim)
    set_lr(parts.engine.groups, factor)
    loss, values = parts.step(batch)
    if parts.average is not None:
        with timed("optimizer"):
            parts.average.update()
    values = {"loss": loss, **values, "lr": parts.optim.lr * factor}
    norm = parts.engine.grad_norm
    if norm is not None:
        values["grad_norm"] = norm
        if parts.train.precision != "fp16" and not 0 <= norm < math.inf:  # fp16 skips such an update by itself
            raise NonFiniteLossError(
                f"the gradient is not finite (norm {norm}, loss {loss:.4g}) in the batch that ends at "
                f"sample {batch['position']}; it starts with {', '.join(batch['keys'][:NAMED_KEYS])} on rank {rank()}. "
                "The last checkpoint is unchanged; lower the learning rate, or use fp32"
            )
    if parts.train.precision == "fp16":
        values["skipped"] = parts.engine.skipped
    if batch.get("retries"):
        values["data_retries"] = batch["retries"]
    values["peak_gib"] = peak_memory(parts.engine.device)
    return replace(state, step=state.step + 1, samples=batch["position"]), values


def _any_rank(parts: LoopParts, *flags: bool) -> list[bool]:
    """Logical OR of each flag over all ranks."""
    if world_size() == 1:
        return list(flags)
    return [flag > 0 for flag in sum_over_ranks(torch.tensor(flags, device=parts.engine.device).float()).tolist()]


def _every(steps: int, step: int) -> bool:
    return steps > 0 and step % steps == 0
