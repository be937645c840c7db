"""Copies of a run's state in the memory of the CPU."""

import torch
from torch import Tensor


class HostCopies:
    """Copies tensors to the CPU, into the memory of the copies that it made under the same names before."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of ``value``, valid until the next call with this name."""
        buffer, dtype = self._buffers.get(name), dtype or value.dtype
        if buffer is None or buffer.shape != value.shape or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(value.shape, dtype=dtype)
        return buffer.copy_(value.detach())
