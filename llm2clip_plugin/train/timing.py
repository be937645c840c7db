"""Where the time of a step goes: seconds by phase, measured without making the device wait.

On a CPU a clock is read where one phase ends and the next begins. On a GPU an event is recorded there, and read when
the device has passed it; so a step that is still being computed is part of a later report.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

# data: waiting for the loader. communication: features and losses of all ranks, and the reduction of gradients
# that DeepSpeed begins after the backward pass; what it overlaps with another phase is part of that phase
PHASES = ("data", "forward", "backward", "optimizer", "communication")
STEP = "step"  # the whole step, by the host's clock


class Clock(ABC):
    """Marks on a time line."""

    @abstractmethod
    def mark(self) -> Any:
        """Now."""

    @abstractmethod
    def passed(self, mark: Any) -> bool:
        """Whether the device has reached a mark."""

    @abstractmethod
    def wait(self, mark: Any) -> None:
        """Wait until it has."""

    @abstractmethod
    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks that have been passed."""


class HostClock(Clock):
    """Of a device that has computed what a call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        return True

    def wait(self, mark: float) -> None: ...

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock(Clock):
    """Of the current stream of a GPU."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1000


class StepTimer:
    """Seconds by phase, summed over the steps that the device has finished.

    Used as a context manager, it is the one that ``timed`` reports to.
    """

    def __init__(self, clock: Clock) -> None:
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

    def totals(self, *, wait: bool = False) -> "Totals":
        """Sums over the steps finished so far; ``wait``: for the device to finish them all."""
        while self._pending:
            wall, marks, end = self._pending[0]
            if wait:
                self._clock.wait(end)
            elif not self._clock.passed(end):
                break
            self._pending.popleft()
            self._steps += 1
            self._sums[STEP] += wall
            ends = [mark for _, mark in marks[1:]] + [end]
            for (phase, start), stop in zip(marks, ends, strict=True):
                self._sums[phase] += self._clock.seconds(start, stop)
        return Totals(self._steps, dict(self._sums))


class Totals:
    """Seconds by phase of a number of steps."""

    def __init__(self, steps: int, sums: dict[str, float]) -> None:
        self.steps = steps
        self.sums = sums

    def mean_since(self, earlier: "Totals") -> dict[str, float]:
        """Seconds of the mean step between two totals; {} if there is none."""
        steps = self.steps - earlier.steps
        return {name: (value - earlier.sums[name]) / steps for name, value in self.sums.items()} if steps else {}


_active: StepTimer | None = None


class timed:  # noqa: N801 - used like a function; a generator would cost twice as much
    """``with timed("backward"):`` the block is this phase of the step; the phase around it is interrupted."""

    __slots__ = ("before", "phase")

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def __enter__(self) -> None:
        self.before = None if _active is None else _active.switch(self.phase)

    def __exit__(self, *error: object) -> None:
        if self.before is not None and _active is not None:
            _active.switch(self.before)


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()


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
