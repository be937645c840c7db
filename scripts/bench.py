"""Helpers of the benchmarks: runs that alternate, peak memory, new processes."""

import argparse
import io
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Run(Generic[T]):
    """One timed call and its result."""

    wall: float  # seconds; on a GPU, between two CUDA events
    cpu: float  # processor seconds of this process, which other programs hardly disturb
    result: T

    @property
    def seconds(self) -> float:
        """Wall time if there is a GPU, else processor time."""
        return self.wall if torch.cuda.is_available() else self.cpu


def timed(work: Callable[[], T]) -> Run[T]:
    """Call ``work`` and wait until the GPU has finished; its time is then measured by CUDA events."""
    if not torch.cuda.is_available():
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        return Run(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, result=result)
    torch.cuda.synchronize()
    start, end, cpu = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), time.process_time()
    start.record()
    result = work()
    end.record()
    torch.cuda.synchronize()
    return Run(wall=start.elapsed_time(end) / 1e3, cpu=time.process_time() - cpu, result=result)


def alternate(ways: Mapping[str, Callable[[], T]], rounds: int, *, warm_up: bool = True) -> dict[str, list[Run[T]]]:
    """Time every way once a round, each round starting with the next way; an additional first round is not counted."""
    names = list(ways)
    runs: dict[str, list[Run[T]]] = {name: [] for name in names}
    for number in range(rounds + warm_up):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            run = timed(ways[name])
            if number >= warm_up:
                runs[name].append(run)
    return runs


def median_seconds(runs: list[Run[Any]], clock: str = "seconds") -> float:
    """Median by one of the clocks of ``Run``."""
    return median(getattr(run, clock) for run in runs)


def speedups(runs: list[Run[Any]], base: list[Run[Any]], clock: str = "seconds") -> list[float]:
    """How many times as fast as ``base``, round by round."""
    return [getattr(b, clock) / getattr(run, clock) for run, b in zip(runs, base, strict=True)]


def peak_growth(work: Callable[[], T], *, cuda: bool = False) -> tuple[int, T]:
    """Bytes of peak memory during ``work`` above the memory before: the GPU's, or this process's (Linux)."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return torch.cuda.max_memory_allocated() - before, result
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _process_memory("VmRSS")
    result = work()
    return _process_memory("VmHWM") - before, result


def _process_memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024  # from kB


def in_new_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a module-level function in a new Python process; its peak memory is not affected by this one."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that describes itself with a module's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, content) pairs as a tar."""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
