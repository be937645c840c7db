"""What the benchmarks share: ways that take turns, peak memory, made-up photographs, and one table.

Run a benchmark from the repository's folder: ``python -m benchmarks.data --help``.
"""

import argparse
import io
import platform
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

T = TypeVar("T")


def parser(doc: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """A parser that describes itself with a module's docstring, with the option of every benchmark."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="timed runs of each way")
    return made


class Run(NamedTuple):
    """One timed call and its result."""

    seconds: float
    result: Any


def timed(work: Callable[[], Any], *, wall: bool = False) -> Run:
    """Call ``work`` and wait until the GPU has finished.

    Seconds are wall time if there is a GPU or if asked, else processor time, which other programs hardly disturb.
    """
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu or wall else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start, result = clock(), work()
    if on_gpu:
        torch.cuda.synchronize()
    return Run(clock() - start, result)


def alternate(ways: Mapping[str, Callable[[], Any]], rounds: int, *, wall: bool = False) -> dict[str, list[Run]]:
    """Time every way once a round, each round starting with the next way; an additional first round is not counted."""
    names = list(ways)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            runs[name].append(timed(ways[name], wall=wall))
    return {name: of_way[1:] for name, of_way in runs.items()}


def peak_growth(work: Callable[[], T]) -> tuple[int, T]:
    """Bytes of peak memory during ``work`` above the memory before: the GPU's, or this process's (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return torch.cuda.max_memory_allocated() - before, result
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, result = _kilobytes("VmRSS"), work()
    return (_kilobytes("VmHWM") - before) * 1024, result


def _kilobytes(field: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def in_new_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a module-level function in a new Python process; its peak memory is not affected by this one."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def alternate_processes(
    measure: Callable[..., tuple[int, Run]], ways: Iterable[str], args: argparse.Namespace
) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """The runs of ``measure(way, args)``, each in a new process, way by way; and the MiB of each way's peak."""
    rounds = [{way: in_new_process(measure, way, args) for way in ways} for _ in range(args.rounds)]
    runs = {way: [one[way][1] for one in rounds] for way in rounds[0]}
    return runs, {way: f"{max(one[way][0] for one in rounds) / 2**20:,.0f}" for way in runs}


def print_table(
    about: str, runs: Mapping[str, Sequence[Run]], *, amount: float, unit: str, **columns: Mapping[str, str]
) -> None:
    """Markdown: ``amount`` of ``unit`` per second of each way, and its speed against the first, round by round.

    Ratios: median [lowest, highest]. ``columns``: title -> way -> cell, in addition.
    """
    base, gpu = next(iter(runs.values())), torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    print(f"\n{about}; {device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    heads = ["way", f"{unit} / s ({'GPU' if gpu else 'CPU'})", "ratio", *columns]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name, of_way in runs.items():
        ratios = [first.seconds / run.seconds for first, run in zip(base, of_way, strict=True)]
        speed = f"{amount / median(run.seconds for run in of_way):,.4g}"
        spread = f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"| {' | '.join([name, speed, spread, *(cells[name] for cells in columns.values())])} |", flush=True)


def write_shard(folder: Path, count: int, *, side: int = 512, quality: int = 95) -> Path:
    """A tar of ``count`` JPEGs with a caption each, as img2dataset writes them."""
    rng, path = np.random.default_rng(0), folder / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            body = io.BytesIO()
            photo_like(rng, side).save(body, "JPEG", quality=quality)
            for suffix, content in (("jpg", body.getvalue()), ("txt", f"caption {number}".encode())):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def photo_like(rng: np.random.Generator, side: int) -> Image.Image:
    """Colored noise whose amplitude falls as f^-1.45: its JPEG is about as large as a photograph's."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = 1
    fields = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) / frequency**1.45).real for _ in range(3)]
    fields = [(field - field.mean()) / field.std() for field in fields]
    pixels = np.stack([0.8 * fields[0] + 0.3 * field for field in fields], axis=-1) * 45 + 120
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
