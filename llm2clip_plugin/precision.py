"""Which precision this machine computes fast: a GPU's by its generation, a CPU's by measurement."""

import functools
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A product of (64, 512) and (512, 512): 33.6 MFLOP take 30 ms at the 1 GFLOPS that a CPU without
# bf16 units makes in bf16, and half a millisecond at the 70 that it makes in fp32.
ROWS = 64
WIDTH = 512
LEAST_TURNS = 3  # of each dtype that is timed, however slow
MEASURED_SECONDS = 0.05
SLOW = 2.0  # times as slow as fp32: from here on, a precision gets a warning


def gpu_precision() -> Literal["bf16", "fp16"]:
    """bf16 if every GPU computes in it; fp16 before NVIDIA's Ampere (T4, V100), where torch
    emulates it slowly."""
    for device in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "fp16"
    return "bf16"


@functools.cache
def cpu_speeds(*dtypes: torch.dtype) -> dict[torch.dtype, float]:
    """GFLOPS of a matrix product on one thread of this CPU, by dtype; measured once a process, in
    about a tenth of a second.

    CPUs differ by a factor of a hundred in bf16, and their flags do not show which. The dtypes take
    turns and the best time of each counts, so that a busy machine gives the same order as a quiet
    one; with several threads, every product would wait for the one that is not running.
    """
    factors = {}
    with single_thread():
        for dtype in dtypes:
            # no random numbers: those of the caller stay as they are
            left = torch.ones(ROWS, WIDTH, dtype=dtype, device="cpu")
            right = torch.ones(WIDTH, WIDTH, dtype=dtype, device="cpu")
            factors[dtype] = (left, right)
            torch.mm(left, right)  # the first call picks a kernel
        best = dict.fromkeys(dtypes, math.inf)
        end = time.perf_counter() + MEASURED_SECONDS
        turns = 0
        while turns < LEAST_TURNS or time.perf_counter() < end:
            for dtype, (left, right) in factors.items():
                started = time.perf_counter()
                torch.mm(left, right)
                best[dtype] = min(best[dtype], time.perf_counter() - started)
            turns += 1
    operations = 2 * ROWS * WIDTH * WIDTH
    return {dtype: operations / seconds / 1e9 for dtype, seconds in best.items()}


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread for torch's products inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest_precision(device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """bf16 on a GPU that supports it, else fp16; on a CPU the faster of fp32 and bf16, measured."""
    if device.type != "cpu":
        return gpu_precision()
    speeds = cpu_speeds(torch.float32, torch.bfloat16)
    is_faster = speeds[torch.bfloat16] > speeds[torch.float32]
    return "bf16" if is_faster else "fp32"


def fastest_dtype(device: torch.device) -> torch.dtype:
    """`fastest_precision` as torch's dtype."""
    return DTYPES[fastest_precision(device)]


def gflops(speed: float) -> str:
    """Such as 94 or 1.3."""
    return f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}"


def slowness(dtype: torch.dtype, device: torch.device, option: str, task: str) -> str:
    """A line about a dtype in which this CPU is slow: SLOW times as slow as in fp32, or slower;
    "" for any other. ``option`` set it, for a ``task`` such as "training"."""
    if device.type != "cpu" or dtype == torch.float32:
        return ""
    speeds = cpu_speeds(torch.float32, dtype)
    ratio = speeds[torch.float32] / speeds[dtype]
    if ratio < SLOW:
        return ""
    name = str(dtype).removeprefix("torch.")
    return (
        f"{name} makes {gflops(speeds[dtype])} GFLOPS on a thread of this CPU and float32 "
        f"{gflops(speeds[torch.float32])}, so {task} in {name} takes up to {ratio:.0f} times as "
        f"long; leave {option} out, or choose float32"
    )


def warn_if_slow(
    dtype: torch.dtype, device: torch.device, option: str, task: str
) -> None:
    """Print the line of `slowness`, if there is one, on stderr, by rank 0 alone."""
    if os.environ.get("RANK", "0") != "0":
        return
    if line := slowness(dtype, device, option, task):
        print(f"warning: {line}", file=sys.stderr)
