"""Where the time of a step goes: seconds by phase, measured without making the device wait.

On a CPU a clock is read where one phase ends and the next begins. On a GPU an event is recorded there, and read when
the device has passed it; so a step that is still being computed is part of a later report.
"""

import time
from collections import deque
from collections.abc import Sequence
from contextlib import ContextDecorator
from typing import Any, NamedTuple

import torch

# data: waiting for the loader. communication: features and losses of all ranks, and the reduction of gradients
# that DeepSpeed begins after the backward pass; what it overlaps with another phase is part of that phase
PHASES = ("data", "forward", "backward", "optimizer", "communication")
STEP = "step"  # the whole step, by the host's clock


class HostClock:
    """Marks on the time line of a device that has computed what a call returns."""

    def mark(self) -> Any:
        """Now."""
        return time.perf_counter()

    def passed(self, mark: Any, *, wait: bool) -> bool:
        """Whether the device has reached a mark; ``wait`` until it has."""
        return True

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks that have been passed."""
        return end - start


class CudaClock(HostClock):
    """Of the current stream of a GPU."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event, *, wait: bool) -> bool:
        if wait:
            mark.synchronize()
        return mark.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1000


class Totals(NamedTuple):
    """Seconds by phase of a number of steps."""

    steps: int
    sums: dict[str, float]

    def mean_since(self, earlier: "Totals") -> dict[str, float]:
        """Seconds of the mean step between two totals; {} if there is none."""
        steps = self.steps - earlier.steps
        return {name: (value - earlier.sums[name]) / steps for name, value in self.sums.items()} if steps else {}


class StepTimer:
    """Seconds by phase, summed over the steps that the device has finished.

    Used as a context manager, it is the one that ``timed`` reports to.
    """

    def __init__(self, clock: HostClock) -> None:
        self._clock = clock
        self._phase: str | None = None  # None between steps
        self._marks: list[tuple[str, Any]] = []  # phase, and where it begins
        self._started = 0.0
        self._pending: deque[tuple[float, list[tuple[str, Any]], Any]] = deque()  # wall seconds, marks, the last mark
        self._sums: dict[str, float] = dict.fromkeys((STEP, *PHASES), 0.0)
        self._steps = 0

    def __enter__(self) -> "StepTimer":
        global _active
        _active = self
        return self

    def __exit__(self, *error: object) -> None:
        global _active
        _active = None

    def start(self) -> None:
        """A step begins, with waiting for its data."""
        self._started, self._phase = time.perf_counter(), "data"
        self._marks = [("data", self._clock.mark())]

    def switch(self, phase: str) -> str | None:
        """Another phase begins; returns the one before, None (and nothing is measured) between steps."""
        before = self._phase
        if before is not None and before != phase:
            self._phase = phase
            self._marks.append((phase, self._clock.mark()))
        return before

    def stop(self) -> None:
        """The step ends."""
        self._pending.append((time.perf_counter() - self._started, self._marks, self._clock.mark()))
        self._phase = None

    def totals(self, *, wait: bool = False) -> Totals:
        """Sums over the steps finished so far; ``wait``: for the device to finish them all."""
        while self._pending and self._clock.passed(self._pending[0][2], wait=wait):
            wall, marks, end = self._pending.popleft()
            self._steps += 1
            self._sums[STEP] += wall
            ends = [mark for _, mark in marks[1:]] + [end]
            for (phase, start), stop in zip(marks, ends, strict=True):
                self._sums[phase] += self._clock.seconds(start, stop)
        return Totals(self._steps, dict(self._sums))


_active: StepTimer | None = None


class timed(ContextDecorator):  # noqa: N801 - used like a function; a generator would cost twice as much
    """``with timed("backward"):`` the block is this phase of the step; the phase around it is interrupted. Also a
    decorator of a function."""

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def _recreate_cm(self) -> "timed":  # for each call of a decorated function
        return timed(self.phase)

    def __enter__(self) -> None:
        self.before = None if _active is None else _active.switch(self.phase)

    def __exit__(self, *error: object) -> None:
        if self.before is not None and _active is not None:
            _active.switch(self.before)


def compare_ranks(ranks: Sequence[tuple[float, float, float]], hosts: Sequence[str]) -> dict[str, Any]:
    """Smallest and largest over ranks, of seconds of a step, of waiting for data, of communication.

    All ranks finish a step together, so the slowest is the one that waits least for the others: the one with the most
    time outside communication.
    """
    busy = [step - communication for step, _, communication in ranks]
    columns = {STEP: [step for step, _, _ in ranks], "data": [data for _, data, _ in ranks], "busy": busy}
    values: dict[str, Any] = {}
    for name, column in columns.items():
        values |= {f"{name}_seconds_min": min(column), f"{name}_seconds_max": max(column)}
    slowest = busy.index(max(busy))
    return {**values, "slowest_rank": slowest, "slowest_host": hosts[slowest]}
