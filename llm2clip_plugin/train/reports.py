"""What a run says about its steps: the bar, metrics.jsonl, DeepSpeed's monitors; time by phase, over ranks, MFU."""

import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.run_files import FAILED, HEADS, LEFT_OUT, METRICS, STOPPED
from llm2clip_plugin.train.checkpoint import TrainState
from llm2clip_plugin.train.distributed import gather_objects, gather_rows, on_first_rank, rank, world_size
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.flops import count_model_flops, least_seconds
from llm2clip_plugin.train.profiling import StepProfiler
from llm2clip_plugin.train.progress import MetricsFile, Progress, label
from llm2clip_plugin.train.run_checkpoints import Checkpoints
from llm2clip_plugin.train.timing import STEP, StepTimer, compare_ranks, make_clock

PROFILE = "profile"  # folder of a run for traces
COMPARE_EVERY = 10  # steps at least between comparisons of ranks, each a collective

Queue = Callable[[], tuple[float, float]]  # batches that are ready, and that the loader has space for


class Reports:
    """The progress bar, metrics.jsonl and DeepSpeed's monitors: rank 0's, silent on the others.

    None of them ends a run: what cannot be written is said once. Every rank calls ``step`` for the same steps.
    """

    def __init__(
        self,
        engine: Engine,
        run_folder: Path,
        state: TrainState,
        *,
        total_steps: int,
        global_batch: int,
        logging_steps: int,
        queue: Queue | None = None,
        profile_steps: int = 0,
    ) -> None:
        """state: where training starts. profile_steps: steps that this rank traces."""
        self.engine, self.run_folder, self.queue = engine, run_folder, queue
        self.total_steps, self.global_batch, self.logging_steps = total_steps, global_batch, logging_steps
        self._step = state.step  # the last one that was reported
        self._file: MetricsFile | None = None  # of rank 0
        on_first_rank(lambda: self._open(state))
        self.progress = Progress(total_steps, start=state.step, show=rank() == 0)
        self.timer = StepTimer(make_clock(engine.device))
        self._line = self._compared = self.timer.totals()  # as of the last line, and of the last comparison of ranks
        self._flops: Counter[torch.dtype] | None = None  # of a step on this rank; counted by rank 0 alone
        remaining = total_steps - state.step
        self._profiler: StepProfiler | None = None
        if min(profile_steps, remaining) > 0:
            self._profiler = StepProfiler(run_folder / PROFILE, profile_steps, remaining=remaining, note=self.note)
        self._hosts = gather_objects(socket.gethostname())
        self._failed = False

    def _open(self, state: TrainState) -> None:
        new = state.step == 0 and not state.before and Checkpoints(self.run_folder, keep=0).latest() is None
        self._file = MetricsFile(self.run_folder / METRICS, from_step=-1 if new else state.step)

    def __enter__(self) -> "Reports":
        self.timer.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.timer.__exit__(*error)
        if self._profiler is not None:
            self._profiler.close()
        if self._file is not None:
            self._attempt(self._file.close)
        self.progress.close()

    @contextmanager
    def count_flops(self) -> Iterator[None]:
        """Count those of a step, on rank 0, the first time."""
        if self._flops is not None or rank() > 0:
            yield
            return
        with count_model_flops() as flops:
            yield
        self._flops = flops

    def step(self, state: TrainState, seconds: float, values: dict[str, float], *, always: bool) -> None:
        """A finished step of ``seconds``; ``always``: write a line of it."""
        self._step = state.step
        if always or state.step % self.logging_steps == 0:
            values = values | self._speed(last=always)
            self._values(state, values)
        self.progress.advance(self.global_batch, seconds, values)
        if self._profiler is not None:
            self._profiler.step()

    def left_out(self, state: TrainState, allowed: int) -> None:
        """The last batch had no update; ``allowed``: as many as the run may leave out."""
        bad = state.bad_batches[-1]
        self.event({**bad, "event": LEFT_OUT})
        self.note(f"warning: {len(state.bad_batches)} of at most {allowed} bad batches left out: {bad['reason']}")

    def scores(self, state: TrainState, scores: dict[str, float]) -> None:
        """An evaluation, in ``state``."""
        self.progress.show_values(scores)
        self._values(state, scores, phase="eval")

    def heads(self, curve: Iterable[dict[str, float]]) -> None:
        """The fit of the heads before step 1, on lines of its own; its ``samples`` are the monitors' x."""
        for line in curve:
            self.event({"step": 0, "samples": 0, "event": HEADS, **{f"heads_{name}": x for name, x in line.items()}})
            if self._file is not None:
                numbers = {label(name, "heads"): x for name, x in line.items() if name not in ("step", "samples")}
                self._attempt(self.engine.report_at, numbers, int(line["samples"]))

    def failed(self, error: BaseException) -> None:
        """The run ends by an error, after the last step that was reported."""
        self._ended(FAILED, self._step, str(error) or type(error).__name__)

    def stopped(self, state: TrainState, reason: str) -> None:
        """The run stops before its end."""
        self._ended(STOPPED, state.step, reason)
        self.note(f"{reason}: saved step {state.step} of {self.total_steps}; rerun the same command to resume")

    def _ended(self, event: str, step: int, reason: str) -> None:
        """A line of metrics.jsonl that says why no more follow."""
        self.event({"step": step, "event": event, "reason": reason, "time": time.strftime("%Y-%m-%d %H:%M:%S")})

    def event(self, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self._file is not None:
            self._attempt(self._file.write, values)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self.progress.note(text)

    def _speed(self, *, last: bool) -> dict[str, Any]:
        """Time by phase and MFU of the mean step since the last line, ranks compared, the loader's queue."""
        now = self.timer.totals(wait=last)
        mean = now.mean_since(self._line)
        self._line = now
        values: dict[str, Any] = {f"{name}_seconds": value for name, value in mean.items()}
        if mean and self._flops:
            values["tflops"] = sum(self._flops.values()) / mean[STEP] / 1e12
            least = least_seconds(self._flops, self.engine.device)
            values |= {"mfu": least / mean[STEP]} if least else {}
        if self.queue is not None:
            values["loader_ready"], values["loader_capacity"] = self.queue()
        if world_size() > 1 and (last or now.steps - self._compared.steps >= COMPARE_EVERY):
            values |= self._compare()
        return values

    def _compare(self) -> dict[str, Any]:
        """Smallest and largest over ranks of the mean step since the last comparison."""
        now = self.timer.totals(wait=True)
        mean = now.mean_since(self._compared)
        self._compared = now
        own = torch.tensor([[mean.get(name, math.nan) for name in (STEP, "data", "communication")]])
        return compare_ranks(gather_rows(own.to(self.engine.device)).tolist(), self._hosts)

    def _values(self, state: TrainState, values: dict[str, Any], *, phase: str = "train") -> None:
        self.event({"step": state.step, "samples": state.samples, **values})
        if self._file is not None:
            numbers = {label(name, phase): value for name, value in values.items() if not isinstance(value, str)}
            self._attempt(self.engine.report, numbers, state.samples)

    def _attempt(self, write: Callable[..., object], *values: object) -> None:
        try:
            write(*values)
        except OSError as error:  # metrics.jsonl keeps its lines in memory until the disk has space again
            if not self._failed:
                self.note(f"warning: cannot log to {self.run_folder}: {error}; training continues")
            self._failed = True
