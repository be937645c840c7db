"""Where an LLM runs and in which dtype, by default."""

import time

import torch


def default_device() -> torch.device:
    """This process's accelerator if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def fastest_dtype(device: torch.device, width: int = 1024) -> torch.dtype:
    """bfloat16 on a GPU that supports it, else float16; on a CPU the faster of float32 and bfloat16, measured in 0.2 s.

    CPUs differ by a factor of ten in bfloat16, in either direction, and their CPU flags do not show which.
    """
    if device.type != "cpu":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    rates = {dtype: _matmul_rate(dtype, width) for dtype in (torch.float32, torch.bfloat16)}
    return max(rates, key=lambda dtype: rates[dtype])


def _matmul_rate(dtype: torch.dtype, width: int, seconds: float = 0.1) -> float:
    """Products per second of (256, width) @ (width, width) on the CPU."""
    left, right = torch.randn(256, width, dtype=dtype), torch.randn(width, width, dtype=dtype)
    product = torch.mm(left, right)  # the first call picks a kernel
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        torch.mm(left, right, out=product)
        count += 1
    return count / passed
