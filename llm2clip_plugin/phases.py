"""What this rank is doing: the phase that messages name when it is late. Standard library only."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")
CHECKPOINT = "checkpoint"  # the phase in which a rank that is to end gets more time


class Phase(NamedTuple):
    """What a rank does since when."""

    name: str
    step: int  # optimizer step, counted from 1; 0 before training
    number: int  # of phases begun: ranks that wait for each other are in phases of about the same number
    since: float  # time.monotonic() of its begin, or of its last progress


_counter = itertools.count()
_now = Phase("start", 0, next(_counter), time.monotonic())


def current() -> Phase:
    """The phase that this process is in."""
    return _now


@contextmanager
def phase(name: str, *, step: int | None = None) -> Iterator[None]:
    """Name what the block does; every rank must begin the same phases in the same order.

    An exception leaves the phase as it is: messages say where it was raised.
    """
    global _now
    before = _now
    _now = Phase(name, before.step if step is None else step, next(_counter), time.monotonic())
    yield
    _now = Phase(before.name, _now.step, next(_counter), time.monotonic())


def progressed() -> None:
    """The phase goes on: something of it is done."""
    global _now
    _now = _now._replace(since=time.monotonic())


def in_phase(name: str, function: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """The function, whose calls are a phase."""

    def named(*args: Arguments.args, **options: Arguments.kwargs) -> Value:
        with phase(name):
            return function(*args, **options)

    return named


def each_in_phase(name: str, items: Iterator[Value], *, first_step: int) -> Iterator[Value]:
    """The items, one a step; waiting for each is a phase."""
    for step in itertools.count(first_step):
        with phase(name, step=step):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
