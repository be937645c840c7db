"""FLOPs of a training step, and the fraction of a device's peak that they are (MFU).

MFU is that of Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, appendix B): the operations that the model needs, one
forward and one backward pass over each sample, by time and peak. What is computed again (gradient checkpointing, the
first pass of gradient caching) does not count. Counted are matrix products, convolutions and attention.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch's counter lacks attention on CPUs
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}

# Name of a device -> dense TFLOP/s with fp32 accumulation, without sparsity: (bf16 and fp16, TF32, fp32); 0: none.
# Sources: NVIDIA's data sheets and architecture white papers of each product, AMD's data sheets of the Instinct series.
# An MI250X is two devices. The first match counts.
PEAKS: tuple[tuple[str, tuple[float, float, float]], ...] = (
    (r"\bMIG\b|Laptop|Max-Q|4090 D\b", (0, 0, 0)),  # a part of a GPU, or one with other clocks: unknown
    (r"\bGB200\b", (2500, 1250, 80)),
    (r"\bB200\b", (2250, 1125, 75)),
    (r"\bH100 PCIe\b", (756, 378, 51)),
    (r"\bH100 NVL\b", (835, 417, 60)),
    (r"\b(H100|H200|H800|GH200)\b", (989, 494, 67)),
    (r"\bH20\b", (148, 74, 44)),
    (r"\b(A100|A800)\b", (312, 156, 19.5)),
    (r"\bA30\b", (165, 82, 10.3)),
    (r"\bA40\b", (149.7, 74.8, 37.4)),
    (r"\bA10G\b", (70, 35, 35)),
    (r"\bA10\b", (125, 62.5, 31.2)),
    (r"\bRTX A6000\b", (154.8, 77.4, 38.7)),
    (r"\bL40S\b", (362, 183, 91.6)),
    (r"\bL40\b", (181, 90.5, 90.5)),
    (r"\bL4\b", (121, 60, 30.3)),
    (r"\bRTX 6000 Ada\b", (364.2, 182.1, 91.1)),
    (r"\bRTX 5090\b", (209.5, 104.8, 104.8)),
    (r"\bRTX 4090\b", (165.2, 82.6, 82.6)),
    (r"\bRTX 3090\b(?! Ti)", (71, 35.6, 35.6)),
    (r"\bMI(300X|325X)\b", (1307, 653.7, 163.4)),
    (r"\bMI250X\b", (191.5, 0, 47.9)),
    (r"\bV100-SXM", (125, 0, 15.7)),
    (r"\bT4\b", (65, 0, 8.1)),
)


class ModelFlops(TorchDispatchMode):
    """Counts, by the dtype that they run in, the FLOPs of everything that is computed under it for the first time."""

    supports_higher_order_operators = True  # passed through, not counted

    def __init__(self) -> None:
        super().__init__()
        self.by_dtype: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(getattr(func, "_overloadpacket", func))
        if formula is not None and not _repeated and not _recomputing():
            dtype = next((value.dtype for value in args if isinstance(value, Tensor)), torch.float32)
            self.by_dtype[dtype] += formula(*args, **(kwargs or {}), out_val=out)
        return out


_repeated = False


@contextmanager
def repeated() -> Iterator[None]:
    """What the block computes is computed again later, and counted then."""
    global _repeated
    _repeated = True
    try:
        yield
    finally:
        _repeated = False


def _recomputing() -> bool:
    """Whether gradient checkpointing is computing a block again, in the backward pass."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "unpack_hook" and frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def peak_of(name: str, dtype: torch.dtype, *, tf32: bool) -> float | None:
    """FLOP/s of a device at best, by its name; None if unknown. tf32: products of fp32 tensors may run in TF32."""
    half, tensor_float, single = next((peaks for pattern, peaks in PEAKS if re.search(pattern, name)), (0, 0, 0))
    peak = half if dtype in (torch.bfloat16, torch.float16) else (tensor_float if tf32 else 0) or single
    return peak * 1e12 or None


def least_seconds(flops: Counter[torch.dtype], device: torch.device) -> float | None:
    """Seconds that the device needs for them at its peak; None on a CPU or if the peak is unknown."""
    if device.type != "cuda" or not flops:
        return None
    name, tf32 = torch.cuda.get_device_name(device), torch.get_float32_matmul_precision() != "highest"
    peaks = {dtype: peak_of(name, dtype, tf32=tf32) for dtype in flops}
    seconds = [count / peak for dtype, count in flops.items() if (peak := peaks[dtype])]
    return sum(seconds) if len(seconds) == len(flops) else None


@contextmanager
def count_model_flops() -> Iterator[Counter[torch.dtype]]:
    """Count what the block computes. Slower by a little Python for each operation; compiled modules run eagerly."""
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes seconds
    eager = torch.compiler.set_stance("force_eager") if dynamo is not None else None
    mode = ModelFlops()
    with mode:
        if eager is None:
            yield mode.by_dtype
        else:
            with eager:
                yield mode.by_dtype
