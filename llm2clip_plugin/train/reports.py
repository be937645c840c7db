"""What a training loop reports: the progress bar, metrics.jsonl, DeepSpeed's monitors, traces; time
by phase and over ranks.
"""

import json
import math
import resource
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.atomic import atomic_file
from llm2clip_plugin.progress import progress_bar
from llm2clip_plugin.run_folder import FAILED, LEFT_OUT, METRICS, STOPPED
from llm2clip_plugin.train.checkpoint import Checkpoints, TrainState
from llm2clip_plugin.train.config import TrainConfig
from llm2clip_plugin.train.distributed import (
    StepTimer,
    gather_objects,
    gather_rows,
    on_first_rank,
    rank,
    world_size,
)
from llm2clip_plugin.train.engine import Engine

PROFILE = "profile"  # folder of a run for traces
# steps at least between comparisons of the ranks' times, each a collective
TIMED_EVERY = 10
# steps before the traced ones, if the run has them; in the last of them the profiler warms up
WARM_UP = 5
SLOW_RANK = 1.2  # a rank that computes so much longer than the fastest one is named


class Reports:
    """The progress bar, metrics.jsonl and DeepSpeed's monitors: rank 0's, silent on the others.

    None of them ends a run: what cannot be written is said once. Every rank calls ``step`` for the
    same steps.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        state: TrainState,
        train: TrainConfig,
        total_steps: int,
    ) -> None:
        """state: where training starts."""
        self.engine = engine
        self.run_folder = folder
        self.total_steps = total_steps
        self.global_batch = train.global_batch
        self.logging_steps = train.logging_steps
        self.values: dict[str, Any] = {}  # the latest ones, for the bar
        self.timer = StepTimer(engine.device)
        self._step = state.step  # the last one that was reported
        # the last one that was reported with its time by phase
        self._timed_at = state.step
        self._samples_per_second = 0.0  # smoothed
        self._metrics: MetricsFile | None = None  # of rank 0
        on_first_rank(lambda: self._open_metrics(state))
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
        self._trace = start_trace(
            folder, train, total_steps - state.step, self._attempt
        )

    def _open_metrics(self, state: TrainState) -> None:
        self._metrics = MetricsFile(self.run_folder, state)

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, *error: object) -> None:
        if self._trace is not None:
            self._trace.stop()
        if self._metrics is not None:
            self._attempt(self._metrics.close)
        self._bar.close()

    def step(
        self,
        state: TrainState,
        seconds: float,
        values: dict[str, float],
        *,
        always: bool,
    ) -> None:
        """A finished step of ``seconds``; ``always``: write a line of it."""
        self._step = state.step
        if always or state.step % self.logging_steps == 0:
            values = values | {"step_seconds": seconds}
            if always or state.step - self._timed_at >= TIMED_EVERY:
                self._timed_at = state.step
                values |= phase_seconds(self.timer, self._hosts, self.engine.device)
            self._line(state, values)
        rate = self.global_batch / max(seconds, 1e-9)
        self._samples_per_second = 0.9 * (self._samples_per_second or rate) + 0.1 * rate
        self.values |= values
        self._describe(refresh=False)
        self._bar.update()
        if self._trace is not None:
            self._trace.step()

    def left_out(self, state: TrainState, allowed: int) -> None:
        """The last batch had no update; ``allowed``: as many as the run may leave out."""
        bad = state.bad_batches[-1]
        self.event({**bad, "event": LEFT_OUT})
        count = len(state.bad_batches)
        self.note(
            f"warning: {count} of at most {allowed} bad batches left out: {bad['reason']}"
        )

    def scores(self, state: TrainState, scores: dict[str, float]) -> None:
        """An evaluation, in ``state``."""
        self.values |= scores
        self._describe(refresh=True)
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
        if self._metrics is not None:
            self._attempt(self._metrics.write, values)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self._show:
            self._bar.write(text, file=sys.stderr)

    def _line(
        self, state: TrainState, values: dict[str, Any], *, phase: str = "train"
    ) -> None:
        self.event({"step": state.step, "samples": state.samples, **values})
        if self._metrics is not None:
            numbers = {
                f"{phase}/{name}": value
                for name, value in values.items()
                if not isinstance(value, str)
            }
            self._attempt(self.engine.monitors.report, numbers, state.samples)

    def _describe(self, *, refresh: bool) -> None:
        """The latest values behind the bar."""
        text = describe_values(self.values, self._samples_per_second)
        self._bar.set_postfix_str(text, refresh=refresh)

    def _attempt(self, write: Callable[..., object], *values: Any) -> None:
        try:
            write(*values)
        except (OSError, RuntimeError) as error:
            # a trace's may be a RuntimeError; metrics.jsonl keeps its lines
            if not self._failed:
                self.note(
                    f"warning: cannot log to {self.run_folder}: {error}; training continues"
                )
            self._failed = True


class MetricsFile:
    """metrics.jsonl: a line of JSON for a step, an evaluation, an event."""

    def __init__(self, run_folder: Path, state: TrainState) -> None:
        """Open it without the lines of steps that a killed run made after its last checkpoint.
        state: where training starts."""
        is_new = (
            state.step == 0
            and not state.before
            and Checkpoints(run_folder, keep=0).latest() is None
        )
        path = run_folder / METRICS
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            last = -1 if is_new else state.step
            lines = path.read_text(encoding="utf-8").splitlines()
            with atomic_file(path) as temporary:
                text = "".join(line + "\n" for line in lines if step_of(line) <= last)
                temporary.write_text(text, encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append a line. Raises OSError."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def step_of(line: str) -> float:
    """The step of a line; infinity for a line that was cut short by a kill."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def describe_values(values: Mapping[str, Any], samples_per_second: float) -> str:
    """``loss 3.21  72 samples/s  R@1 image->text 0.12, text->image 0.14  1.9 GiB memory``."""
    parts = [f"loss {values['loss']:.4g}"] if "loss" in values else []
    parts.append(f"{samples_per_second:.3g} samples/s")
    if values.get("wait_share", 0) >= 0.05:
        parts.append(f"waiting for data {100 * values['wait_share']:.0f} %")
    if "i2t_r1" in values:
        parts.append(
            f"R@1 image->text {values['i2t_r1']:.3f}, text->image {values['t2i_r1']:.3f}"
        )
    if "peak_gib" in values:
        parts.append(f"{values['peak_gib']:.2f} GiB memory")
    if values.get("busy_seconds_max", 0) > SLOW_RANK * values.get(
        "busy_seconds_min", math.inf
    ):
        parts.append(f"slow: rank {values['slowest_rank']} ({values['slowest_host']})")
    return "  ".join(parts)


def phase_seconds(
    timer: StepTimer, hosts: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Seconds by phase of the mean step since the last call; of several ranks, the smallest and
    largest, and which rank on which of the ``hosts`` is the slowest. Every rank must call this."""
    mean = timer.lap()
    values: dict[str, Any] = {f"{name}_seconds": value for name, value in mean.items()}
    if world_size() > 1:
        of_this_rank = [sum(mean.values()), mean["data"], mean["communication"]]
        seconds = gather_rows(torch.tensor([of_this_rank]).to(device))
        steps, data, communication = seconds.T.tolist()
        step_and_wait = zip(steps, communication, strict=True)
        busy = [step - waited for step, waited in step_and_wait]
        for name, column in (("step", steps), ("data", data), ("busy", busy)):
            values |= {
                f"{name}_seconds_min": min(column),
                f"{name}_seconds_max": max(column),
            }
        # all finish a step together: the slowest waits least for the others
        slowest = busy.index(max(busy))
        values |= {"slowest_rank": slowest, "slowest_host": hosts[slowest]}
    return values


def start_trace(
    folder: Path,
    train: TrainConfig,
    steps_left: int,
    attempt: Callable[..., None],
) -> torch.profiler.profile | None:
    """The profiler of this rank, which writes the trace into the run's folder by ``attempt``; None
    if it traces no step."""
    steps = min(train.profile_steps, steps_left)
    if steps <= 0 or not (train.profile_all_ranks or rank() == 0):
        return None
    name = f"{socket.gethostname()}-rank{rank()}"  # NAME.TIME.pt.trace.json
    write = torch.profiler.tensorboard_trace_handler(str(folder / PROFILE), name)
    before = min(WARM_UP, steps_left - steps)
    schedule = torch.profiler.schedule(
        skip_first=max(0, before - 1),
        wait=0,
        warmup=min(1, before),
        active=steps,
        repeat=1,
    )
    trace = torch.profiler.profile(
        schedule=schedule,
        on_trace_ready=lambda profile: attempt(write, profile),
    )
    trace.start()
    return trace


def peak_memory(device: torch.device) -> float:
    """Peak memory so far in GiB: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
