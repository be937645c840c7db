"""What a run says about its steps: the bar, metrics.jsonl, DeepSpeed's monitors; time by phase and over ranks."""

import json
import math
import resource
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.console import progress_bar
from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.files import FAILED, LEFT_OUT, METRICS, STOPPED
from llm2clip_plugin.train.checkpoint import Checkpoints, TrainState
from llm2clip_plugin.train.config import TrainConfig
from llm2clip_plugin.train.distributed import StepTimer, gather_objects, gather_rows, on_first_rank, rank, world_size
from llm2clip_plugin.train.engine import Engine

PROFILE = "profile"  # folder of a run for traces
TIMED_EVERY = 10  # steps at least between comparisons of the ranks' times, each a collective
WARM_UP = 5  # steps before the traced ones, if the run has them; in the last of them the profiler warms up
SLOW_RANK = 1.2  # a rank that computes so much longer than the fastest one is named


class Reports:
    """The progress bar, metrics.jsonl and DeepSpeed's monitors: rank 0's, silent on the others.

    None of them ends a run: what cannot be written is said once. Every rank calls ``step`` for the same steps.
    """

    def __init__(
        self, engine: Engine, run_folder: Path, state: TrainState, train: TrainConfig, total_steps: int
    ) -> None:
        """state: where training starts."""
        self.engine, self.run_folder = engine, run_folder
        self.total_steps, self.global_batch, self.logging_steps = total_steps, train.global_batch, train.logging_steps
        self.values: dict[str, Any] = {}  # the latest ones, for the bar
        self.timer = StepTimer(engine.device)
        self._step = self._timed_at = state.step  # the last one that was reported, and with its time by phase
        self._samples_per_second = 0.0  # smoothed
        self._file: Any = None  # of rank 0
        on_first_rank(lambda: self._open(state))
        self._show = rank() == 0 and total_steps > 0  # heads alone have no steps
        self._bar = progress_bar(
            total=total_steps, label="train", unit="steps", initial=state.step, show=self._show, delay=0.0
        )
        self._hosts = gather_objects(socket.gethostname())
        self._failed = False
        self._profile: Any = None
        steps = min(train.profile_steps, total_steps - state.step)
        if steps > 0 and (train.profile_all_ranks or rank() == 0):
            name = f"{socket.gethostname()}-rank{rank()}"  # NAME.TIME.pt.trace.json
            write = torch.profiler.tensorboard_trace_handler(str(run_folder / PROFILE), name)
            before = min(WARM_UP, total_steps - state.step - steps)
            first, warm_up = max(0, before - 1), min(1, before)
            self._profile = torch.profiler.profile(
                schedule=torch.profiler.schedule(skip_first=first, wait=0, warmup=warm_up, active=steps, repeat=1),
                on_trace_ready=lambda profile: self._attempt(write, profile),
            )
            self._profile.start()

    def _open(self, state: TrainState) -> None:
        """Open metrics.jsonl, without the lines of steps that a killed run made after its last checkpoint."""
        new = state.step == 0 and not state.before and Checkpoints(self.run_folder, keep=0).latest() is None
        path = self.run_folder / METRICS
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            last = -1 if new else state.step
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= last]
            with atomic_file(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, *error: object) -> None:
        if self._profile is not None:
            self._profile.stop()
        if self._file is not None:
            self._attempt(self._file.close)
        self._bar.close()

    def step(self, state: TrainState, seconds: float, values: dict[str, float], *, always: bool) -> None:
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
        self.note(f"warning: {len(state.bad_batches)} of at most {allowed} bad batches left out: {bad['reason']}")

    def scores(self, state: TrainState, scores: dict[str, float]) -> None:
        """An evaluation, in ``state``."""
        self.values |= scores
        self._bar.set_postfix_str(self._description())
        self._line(state, scores, phase="eval")

    def ended(self, reason: str, *, failed: bool) -> None:
        """The run ends before its last step, by an error or on request."""
        event, now = FAILED if failed else STOPPED, time.strftime("%Y-%m-%d %H:%M:%S")
        self.event({"step": self._step, "event": event, "reason": reason, "time": now})
        if not failed:
            self.note(f"{reason}: saved step {self._step} of {self.total_steps}; rerun the same command to resume")

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
        """Seconds by phase of the mean step since the last call; of several ranks, the smallest and largest."""
        mean = self.timer.lap()
        values: dict[str, Any] = {f"{name}_seconds": value for name, value in mean.items()}
        if world_size() > 1:
            own = torch.tensor([[sum(mean.values()), mean["data"], mean["communication"]]])
            steps, data, communication = gather_rows(own.to(self.engine.device)).T.tolist()
            busy = [step - waited for step, waited in zip(steps, communication, strict=True)]
            for name, column in (("step", steps), ("data", data), ("busy", busy)):
                values |= {f"{name}_seconds_min": min(column), f"{name}_seconds_max": max(column)}
            slowest = busy.index(max(busy))  # all finish a step together: the slowest waits least for the others
            values |= {"slowest_rank": slowest, "slowest_host": self._hosts[slowest]}
        return values

    def _line(self, state: TrainState, values: dict[str, Any], *, phase: str = "train") -> None:
        self.event({"step": state.step, "samples": state.samples, **values})
        if self._file is not None:
            numbers = {f"{phase}/{name}": value for name, value in values.items() if not isinstance(value, str)}
            self._attempt(self.engine.report, numbers, state.samples)

    def _attempt(self, write: Callable[..., object], *values: Any) -> None:
        try:
            write(*values)
        except (OSError, RuntimeError) as error:  # a trace's may be a RuntimeError; metrics.jsonl keeps its lines
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
            parts.append(f"R@1 image->text {values['i2t_r1']:.3f}, text->image {values['t2i_r1']:.3f}")
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
