"""The training loop: steps, learning rate, checkpoints, evaluation, signals; independent of model
and data.

And what it reports: the bar, metrics.jsonl, DeepSpeed's monitors; time by phase and over ranks.
"""

import json
import math
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.atomic import atomic_file
from llm2clip_plugin.errors import NonFiniteLossError
from llm2clip_plugin.progress import phase, progress_bar
from llm2clip_plugin.run_folder import FAILED, HEADS, LEFT_OUT, METRICS, STOPPED
from llm2clip_plugin.signals import StopRequest
from llm2clip_plugin.train.checkpoint import Checkpoints, Saver, TrainState
from llm2clip_plugin.train.config import OptimConfig, TrainConfig
from llm2clip_plugin.train.distributed import (
    StepTimer,
    gather_objects,
    gather_rows,
    on_first_rank,
    rank,
    timed,
    world_size,
)
from llm2clip_plugin.train.engine import Engine, Reference
from llm2clip_plugin.train.optim import lr_factor, set_lr
from llm2clip_plugin.train.step import Batch, ContrastiveStep, Flags

PROFILE = "profile"  # folder of a run for traces
TIMED_EVERY = 10  # steps at least between comparisons of the ranks' times, each a collective
# steps before the traced ones, if the run has them; in the last of them the profiler warms up
WARM_UP = 5
SLOW_RANK = 1.2  # a rank that computes so much longer than the fastest one is named


class Reports:
    """The progress bar, metrics.jsonl and DeepSpeed's monitors: rank 0's, silent on the others.

    None of them ends a run: what cannot be written is said once. Every rank calls ``step`` for the
    same steps.
    """

    def __init__(
        self, engine: Engine, folder: Path, state: TrainState, train: TrainConfig, total_steps: int
    ) -> None:
        """state: where training starts."""
        self.engine = engine
        self.run_folder = folder
        self.total_steps = total_steps
        self.global_batch = train.global_batch
        self.logging_steps = train.logging_steps
        self.values: dict[str, Any] = {}  # the latest ones, for the bar
        self.timer = StepTimer(engine.device)
        # the last one that was reported, and with its time by phase
        self._step = self._timed_at = state.step
        self._samples_per_second = 0.0  # smoothed
        self._file: Any = None  # of rank 0
        on_first_rank(lambda: self._open(state))
        self._show = rank() == 0 and total_steps > 0  # heads alone have no steps
        self._bar = progress_bar(
            total=total_steps,
            label="train",
            unit="steps",
            initial=state.step,
            show=self._show,
            delay=0.0,
        )
        self._hosts = gather_objects(socket.gethostname())
        self._failed = False
        self._profile: Any = None
        steps = min(train.profile_steps, total_steps - state.step)
        if steps > 0 and (train.profile_all_ranks or rank() == 0):
            name = f"{socket.gethostname()}-rank{rank()}"  # NAME.TIME.pt.trace.json
            write = torch.profiler.tensorboard_trace_handler(str(folder / PROFILE), name)
            before = min(WARM_UP, total_steps - state.step - steps)
            first = max(0, before - 1)
            warm_up = min(1, before)
            self._profile = torch.profiler.profile(
                schedule=torch.profiler.schedule(
                    skip_first=first, wait=0, warmup=warm_up, active=steps, repeat=1
                ),
                on_trace_ready=lambda profile: self._attempt(write, profile),
            )
            self._profile.start()

    def _open(self, state: TrainState) -> None:
        """Open metrics.jsonl, without the lines of steps that a killed run made after its last
        checkpoint."""
        new = (
            state.step == 0
            and not state.before
            and Checkpoints(self.run_folder, keep=0).latest() is None
        )
        path = self.run_folder / METRICS
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            last = -1 if new else state.step
            lines = path.read_text(encoding="utf-8").splitlines()
            with atomic_file(path) as temporary:
                text = "".join(line + "\n" for line in lines if _step_of(line) <= last)
                temporary.write_text(text, encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, *error: object) -> None:
        if self._profile is not None:
            self._profile.stop()
        if self._file is not None:
            self._attempt(self._file.close)
        self._bar.close()

    def step(
        self, state: TrainState, seconds: float, values: dict[str, float], *, always: bool
    ) -> None:
        """A finished step of ``seconds``; ``always``: write a line of it."""
        self._step = state.step
        if always or state.step % self.logging_steps == 0:
            values = values | {"step_seconds": seconds}
            if always or state.step - self._timed_at >= TIMED_EVERY:
                self._timed_at = state.step
                values |= self._phases()
            self._line(state, values)
        rate = self.global_batch / max(seconds, 1e-9)
        self._samples_per_second = 0.9 * (self._samples_per_second or rate) + 0.1 * rate
        self.values |= values
        self._bar.set_postfix_str(self._description(), refresh=False)
        self._bar.update()
        if self._profile is not None:
            self._profile.step()

    def left_out(self, state: TrainState, allowed: int) -> None:
        """The last batch had no update; ``allowed``: as many as the run may leave out."""
        bad = state.bad_batches[-1]
        self.event({**bad, "event": LEFT_OUT})
        count = len(state.bad_batches)
        self.note(f"warning: {count} of at most {allowed} bad batches left out: {bad['reason']}")

    def scores(self, state: TrainState, scores: dict[str, float]) -> None:
        """An evaluation, in ``state``."""
        self.values |= scores
        self._bar.set_postfix_str(self._description())
        self._line(state, scores, phase="eval")

    def ended(self, reason: str, *, failed: bool) -> None:
        """The run ends before its last step, by an error or on request."""
        event = FAILED if failed else STOPPED
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self.event({"step": self._step, "event": event, "reason": reason, "time": now})
        if not failed:
            self.note(
                f"{reason}: saved step {self._step} of {self.total_steps}; "
                "rerun the same command to resume"
            )

    def event(self, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self._file is not None:
            self._attempt(self._file.write, json.dumps(values) + "\n")
            self._attempt(self._file.flush)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self._show:
            self._bar.write(text, file=sys.stderr)

    def _phases(self) -> dict[str, Any]:
        """Seconds by phase of the mean step since the last call; of several ranks, the smallest and
        largest."""
        mean = self.timer.lap()
        values: dict[str, Any] = {f"{name}_seconds": value for name, value in mean.items()}
        if world_size() > 1:
            seconds = torch.tensor([[sum(mean.values()), mean["data"], mean["communication"]]])
            steps, data, communication = gather_rows(seconds.to(self.engine.device)).T.tolist()
            busy = [step - waited for step, waited in zip(steps, communication, strict=True)]
            for name, column in (("step", steps), ("data", data), ("busy", busy)):
                values |= {f"{name}_seconds_min": min(column), f"{name}_seconds_max": max(column)}
            # all finish a step together: the slowest waits least for the others
            slowest = busy.index(max(busy))
            values |= {"slowest_rank": slowest, "slowest_host": self._hosts[slowest]}
        return values

    def _line(self, state: TrainState, values: dict[str, Any], *, phase: str = "train") -> None:
        self.event({"step": state.step, "samples": state.samples, **values})
        if self._file is not None:
            numbers = {
                f"{phase}/{name}": value
                for name, value in values.items()
                if not isinstance(value, str)
            }
            self._attempt(self.engine.report, numbers, state.samples)

    def _attempt(self, write: Callable[..., object], *values: Any) -> None:
        try:
            write(*values)
        except (OSError, RuntimeError) as error:
            # a trace's may be a RuntimeError; metrics.jsonl keeps its lines
            if not self._failed:
                self.note(f"warning: cannot log to {self.run_folder}: {error}; training continues")
            self._failed = True

    def _description(self) -> str:
        """``loss 3.21  72 samples/s  R@1 image->text 0.12, text->image 0.14  1.9 GiB memory``."""
        values = self.values
        parts = [f"loss {values['loss']:.4g}"] if "loss" in values else []
        parts.append(f"{self._samples_per_second:.3g} samples/s")
        if values.get("wait_share", 0) >= 0.05:
            parts.append(f"waiting for data {100 * values['wait_share']:.0f} %")
        if "i2t_r1" in values:
            parts.append(
                f"R@1 image->text {values['i2t_r1']:.3f}, text->image {values['t2i_r1']:.3f}"
            )
        if "peak_gib" in values:
            parts.append(f"{values['peak_gib']:.2f} GiB memory")
        if values.get("busy_seconds_max", 0) > SLOW_RANK * values.get("busy_seconds_min", math.inf):
            parts.append(f"slow: rank {values['slowest_rank']} ({values['slowest_host']})")
        return "  ".join(parts)


def _step_of(line: str) -> float:
    """The step of a line; infinity for a line that was cut short by a kill."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def peak_memory(device: torch.device) -> float:
    """Peak memory so far in GiB: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


# The loop.

Evaluate = Callable[[], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class LoopParts:
    """Everything that ``run_loop`` uses."""

    step: ContrastiveStep
    batches: Iterator[Batch]
    engine: Engine
    # by the name of their file in a checkpoint
    references: Mapping[str, Reference] = field(default_factory=dict)
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
        parts.engine, parts.run_folder, parts.state, parts.train, total_steps=parts.total_steps
    ) as reports:
        noted = {"note": reports.note, "event": reports.event}
        with Saver(parts.checkpoints, parts.engine, parts.references, **noted) as saver:
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

    def flags() -> Flags:
        return Flags(
            stop=bool(parts.stop),
            save_due=time.monotonic() - saved_at >= save_seconds,
            saving=saver.busy,
        )

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
    if state.evaluated < state.step:  # killed between a checkpoint and its evaluation, perhaps
        state = _evaluate_if_due(parts, state, reports, saver)
    while state.step < parts.total_steps:
        state, seconds, values = _timed_step(parts, state, reports, flags)
        raised = parts.step.raised
        last = raised.stop or state.step == parts.total_steps
        reports.step(state, seconds, values, always=last)
        save_due = save_due or raised.save_due or _due(parts.train.save_steps, state.step)
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
    if parts.evaluate is None or not (
        state.step == parts.total_steps or _due(parts.train.eval_steps, state.step)
    ):
        return state
    state = replace(state, metrics=parts.evaluate(), evaluated=state.step)
    reports.scores(state, state.metrics)
    saver.record_metrics(state)
    return state


def _timed_step(
    parts: LoopParts, state: TrainState, reports: Reports, flags: Callable[[], Flags]
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
        values = {"loss": loss, **values, "grad_norm": engine.grad_norm}
        values = {
            name: value
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        }
    except NonFiniteLossError as error:
        if len(state.bad_batches) >= parts.train.skip_bad_batches:
            raise
        values = {}
        bad = [{"step": state.step + 1, "samples": batch["position"], "reason": error.what}]
    with timed("optimizer"):
        for reference in parts.references.values():
            reference.update()
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
    values |= {"lr": parts.optim.lr * factor, "peak_gib": peak_memory(engine.device)}
    values |= {
        "samples_per_second": parts.train.global_batch / seconds,
        "wait_share": waited / seconds,
    }
    if parts.train.precision == "fp16":
        values["skipped"] = engine.skipped
    if "images_per_second" in batch:
        values["loader_images_per_second"] = batch["images_per_second"]
    if batch.get("retries"):
        values["data_retries"] = batch["retries"]
    return state, seconds, values
