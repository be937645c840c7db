"""What the benchmarks share: ways that take turns, peak memory, made-up photographs, and one table.

Run a benchmark from the repository's folder: ``python -m scripts.benchmarks.data --help``.
"""

import argparse
import ctypes
import io
import platform
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.samples import AugmentConfig
from llm2clip_plugin.data.sources import SourceConfig, open_source

DTYPES = ("float32", "bfloat16", "float16")
Work = Callable[[], Any]
Run = tuple[float, Any]  # seconds of a call, and its result


def parse(
    doc: str | None, rounds: int = 5, **options: tuple[Any, ...]
) -> argparse.Namespace:
    """The command line of a benchmark; ``doc``: its description. ``options``: name -> default,
    help, then the choices if it has any; a list as default takes several values."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    timing = {"rounds": (rounds, "timed runs of each way")} if rounds else {}
    for name, (default, text, *choices) in {**timing, **options}.items():
        several: dict[str, Any] = {}
        value = default
        if isinstance(default, list):
            several = {"nargs": "+"}
            value = default[0]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=default,
            help=text,
            type=type(value),
            choices=choices or None,
            **several,
        )
    return parser.parse_args()


def seconds() -> float:
    """Wall time when the GPU has finished. Without a GPU: processor time of this process and of its
    children that have ended, which other programs hardly disturb."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def timed(work: Work) -> Run:
    start = seconds()
    result = work()
    return seconds() - start, result


def alternate(ways: Mapping[str, Work], rounds: int) -> dict[str, list[Run]]:
    """Time every way once a round, each round starting with the next way; an additional first round
    is not counted."""
    order = deque(ways)
    runs = {name: list[Run]() for name in ways}
    for _ in range(rounds + 1):
        for name in order:
            runs[name].append(timed(ways[name]))
        order.rotate(-1)
    return {name: runs_of_way[1:] for name, runs_of_way in runs.items()}


def alternate_processes(
    ways: Mapping[str, Callable[[argparse.Namespace], Work]],
    args: argparse.Namespace,
    rounds: int,
) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """The runs of what each way prepares, each in a new process; MiB of each way's peak above the
    memory before."""
    runs = {way: list[Run]() for way in ways}
    peaks = {way: list[int]() for way in ways}
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(rounds):
            for way, prepare in ways.items():
                peak, run = pool.apply(_measure, (prepare, args))
                peaks[way].append(peak)
                runs[way].append(run)
    return runs, {way: f"{max(sizes) / 2**20:,.0f}" for way, sizes in peaks.items()}


def _measure(
    prepare: Callable[[argparse.Namespace], Work], args: argparse.Namespace
) -> tuple[int, Run]:
    """Bytes of peak memory above the memory before, of the GPU or else of this process (Linux); and
    the run."""
    work = prepare(args)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run = timed(work)
        return torch.cuda.max_memory_allocated() - before, run
    # otherwise memory that was freed before counts as in use
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_bytes("VmRSS")
    run = timed(work)
    return _status_bytes("VmHWM") - before, run


def _status_bytes(field: str) -> int:
    """A size in Linux's /proc/self/status."""
    _, _, after = Path("/proc/self/status").read_text().partition(f"{field}:")
    kib = after.split()[0]
    return int(kib) * 1024


def print_table(
    about: str,
    runs: Mapping[str, Sequence[Run]],
    *,
    amount: float,
    unit: str,
    **columns: Mapping[str, str],
) -> None:
    """Markdown: ``amount`` of ``unit`` per second of each way, and its speed against the first,
    round by round: median [lowest, highest]. ``columns``: title -> way -> cell, in addition."""
    if torch.cuda.is_available():
        kind = "GPU"
        device = torch.cuda.get_device_name()
    else:
        kind = "CPU"
        device = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    print(f"\n{about}; {device}, {threads} threads, torch {torch.__version__}\n")
    heads = ["way", f"{unit} / s ({kind})", "ratio", *columns]
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    first_way = next(iter(runs.values()))
    first_times = [elapsed for elapsed, _ in first_way]
    for name, runs_of_way in runs.items():
        times = [elapsed for elapsed, _ in runs_of_way]
        of_round = zip(first_times, times, strict=True)
        ratios = [first / elapsed for first, elapsed in of_round]
        speed = f"{amount / median(times):,.4g}"
        spread = f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        cells = [name, speed, spread, *(column[name] for column in columns.values())]
        print(f"| {' | '.join(cells)} |", flush=True)


def write_shard(
    folder: Path, count: int, *, side: int = 512, quality: int = 95
) -> Path:
    """A tar of ``count`` JPEGs with a caption each, as img2dataset writes them."""
    from webdataset.writer import TarWriter

    rng = np.random.default_rng(0)
    path = folder / "00000.tar"
    with TarWriter(str(path)) as tar:
        for number in range(count):
            picture = io.BytesIO()
            photo_like(rng, side).save(picture, "JPEG", quality=quality)
            sample = {
                "__key__": f"{number:05d}",
                "jpg": picture.getvalue(),
                "txt": f"caption {number}",
            }
            tar.write(sample)
    return path


def photo_like(rng: np.random.Generator, side: int) -> Image.Image:
    """Colored noise whose amplitude falls as f^-1.45: its JPEG is about as large as a
    photograph's."""
    frequencies = np.fft.fftfreq(side)
    frequency = np.hypot(frequencies[:, None], frequencies[None])
    frequency[0, 0] = 1
    fields = []
    for _ in range(3):
        noise = np.fft.fft2(rng.standard_normal((side, side)))
        field = np.fft.ifft2(noise / frequency**1.45).real
        fields.append((field - field.mean()) / field.std())
    # the channels have most in common, as those of a photograph
    channels = [0.8 * fields[0] + 0.3 * field for field in fields]
    pixels = np.stack(channels, axis=-1) * 45 + 120
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg_batches(
    path: Path, cache: Any, images: ImageConfig, args: Any, *, workers: int = 0
) -> Iterator[Any]:
    """Endless batches of ``args.batch`` by this project's loader over a tar, with embeddings if
    there is a cache."""
    source = open_source(SourceConfig(path=str(path)))
    augment = AugmentConfig(scale=tuple(args.scale))
    dataset = PairDataset([source], [cache], images, augment, seed=0)
    return iter(PairLoader(dataset, local_batch=args.batch, workers=workers))
