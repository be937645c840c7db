"""The training loop: steps, learning rate, checkpoints, evaluation, signals; independent of model
and data.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm2clip_plugin.errors import NonFiniteLossError
from llm2clip_plugin.progress import phase
from llm2clip_plugin.run_folder import HEADS
from llm2clip_plugin.signals import StopRequest
from llm2clip_plugin.train.averages import WeightAverage
from llm2clip_plugin.train.checkpoint import Checkpoints, Saver, TrainState
from llm2clip_plugin.train.config import OptimConfig, TrainConfig
from llm2clip_plugin.train.distributed import (
    gather_objects,
    on_first_rank,
    timed,
)
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.optim import lr_factor, set_lr
from llm2clip_plugin.train.reports import Reports, peak_memory
from llm2clip_plugin.train.step import Batch, ContrastiveStep, Flags, SharedFlags

Evaluate = Callable[[], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class LoopParts:
    """Everything that ``run_loop`` uses."""

    step: ContrastiveStep
    batches: Iterator[Batch]
    engine: Engine
    # by the name of their file in a checkpoint
    averages: Mapping[str, WeightAverage] = field(default_factory=dict)
    checkpoints: Checkpoints
    evaluate: Evaluate | None  # called on every rank
    before: Evaluate | None = None  # the same before step 1, in a new run
    # the curve of a fit of the heads before step 1, in a new run
    heads: Sequence[dict[str, float]] = ()
    train: TrainConfig
    optim: OptimConfig
    total_steps: int
    run_folder: Path
    state: TrainState  # of the checkpoint resumed from, or a new run's
    stop: StopRequest


def run_loop(parts: LoopParts) -> TrainState:
    """Train to the end, or until a stop is requested; returns the final state, which is saved.

    Raises NonFiniteLossError on every rank, and OSError if the final state cannot be saved; the
    last complete checkpoint is unchanged.
    """
    with Reports(
        parts.engine,
        parts.run_folder,
        parts.state,
        parts.train,
        total_steps=parts.total_steps,
    ) as reports:
        noted = {"note": reports.note, "event": reports.event}
        with Saver(parts.checkpoints, parts.engine, parts.averages, **noted) as saver:
            for line in parts.heads:
                values = {f"heads_{name}": value for name, value in line.items()}
                reports.event({"step": 0, "samples": 0, "event": HEADS, **values})
            try:
                state, stopped = _steps(parts, reports, saver)
                saver.finish()
            except (Exception, KeyboardInterrupt) as error:
                reports.ended(str(error) or type(error).__name__, failed=True)
                raise
        if stopped:
            reports.ended(parts.stop.reason, failed=False)
    return state


def _steps(parts: LoopParts, reports: Reports, saver: Saver) -> tuple[TrainState, bool]:
    """The state in which training ended, whose checkpoint is being written, and whether a stop was
    requested."""
    state = parts.state
    saved_at = time.monotonic()
    save_due = False
    stop = any(gather_objects(bool(parts.stop)))
    save_seconds = 60 * parts.train.save_minutes or math.inf

    def read_flags() -> Flags:
        return Flags(
            stop=bool(parts.stop),
            save_due=time.monotonic() - saved_at >= save_seconds,
            saving=saver.busy,
        )

    flags = SharedFlags(read_flags)
    if parts.before is not None and state.step == 0 and not state.before and not stop:
        state = replace(state, before=parts.before())
        reports.scores(state, state.before)
        if not parts.total_steps:  # these are the run's scores
            state = replace(state, metrics=state.before, evaluated=0)
    # no step to make: requested before the first, or resumed at the end
    if stop or state.step >= parts.total_steps:
        # resumed from another folder
        if not on_first_rank(lambda: parts.checkpoints.path(state.step).is_dir()):
            saver.save(state, last=True)
        if stop:
            return state, True
    if (
        state.evaluated < state.step
    ):  # killed between a checkpoint and its evaluation, perhaps
        state = _evaluate_if_due(parts, state, reports, saver)
    while state.step < parts.total_steps:
        state, seconds, values = _timed_step(parts, state, reports, flags)
        raised = flags.raised
        last = raised.stop or state.step == parts.total_steps
        reports.step(state, seconds, values, always=last)
        save_due = (
            save_due or raised.save_due or _due(parts.train.save_steps, state.step)
        )
        # a save that comes while one is written waits for it
        if last or (save_due and not raised.saving):
            saver.save(state, last=last)
            saved_at = time.monotonic()
            save_due = False
        if raised.stop:
            return state, True
        state = _evaluate_if_due(parts, state, reports, saver)
    return state, False


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _evaluate_if_due(
    parts: LoopParts, state: TrainState, reports: Reports, saver: Saver
) -> TrainState:
    """Evaluate every so many steps and at the end, after the checkpoint of the same step, which
    gets the scores."""
    is_last = state.step == parts.total_steps
    is_due = is_last or _due(parts.train.eval_steps, state.step)
    if parts.evaluate is None or not is_due:
        return state
    state = replace(state, metrics=parts.evaluate(), evaluated=state.step)
    reports.scores(state, state.metrics)
    saver.record_metrics(state)
    return state


def _timed_step(
    parts: LoopParts, state: TrainState, reports: Reports, flags: SharedFlags
) -> tuple[TrainState, float, dict[str, float]]:
    """A step with its learning rate, from waiting for its batch to the moving averages; its
    seconds, values to report.

    A batch with a non-finite loss or gradient is left out and listed in the state: a step like any
    other, whose update is missing. One more than train.skip_bad_batches raises NonFiniteLossError.
    """
    started = time.perf_counter()
    engine = parts.engine
    reports.timer.start()
    batch = next(parts.batches)
    waited = time.perf_counter() - started
    reports.timer.switch("forward")
    factor = lr_factor(state.step, parts.total_steps, parts.optim)
    set_lr(engine.groups, factor)
    bad: list[dict[str, Any]] = []
    try:
        with phase("forward and backward"):
            loss, values = parts.step(batch, flags)
        measured = {"loss": loss, **values, "grad_norm": engine.grad_norm}
        values = {
            name: value
            for name, value in measured.items()
            if value is not None and math.isfinite(value)
        }
    except NonFiniteLossError as error:
        if len(state.bad_batches) >= parts.train.skip_bad_batches:
            raise
        values = {}
        bad_batch = {"step": state.step + 1, "samples": batch["position"]}
        bad = [{**bad_batch, "reason": error.what}]
    with timed("optimizer"):
        for average in parts.averages.values():
            average.update()
    reports.timer.switch("")
    seconds = time.perf_counter() - started
    state = replace(
        state,
        step=state.step + 1,
        samples=batch["position"],
        seconds=state.seconds + seconds,
        bad_batches=[*state.bad_batches, *bad],
    )
    if bad:
        reports.left_out(state, parts.train.skip_bad_batches)
    values |= {
        "lr": parts.optim.lr * factor,
        "peak_gib": peak_memory(engine.device),
        "samples_per_second": parts.train.global_batch / seconds,
        "wait_share": waited / seconds,
    }
    if parts.train.precision == "fp16":
        values["skipped"] = engine.skipped
    return state, seconds, values | loader_values(batch)


def loader_values(batch: Batch) -> dict[str, float]:
    """What the loader reports with a batch."""
    values: dict[str, float] = {}
    if "images_per_second" in batch:
        values["loader_images_per_second"] = batch["images_per_second"]
    if batch.get("retries"):
        values["data_retries"] = batch["retries"]
    return values
