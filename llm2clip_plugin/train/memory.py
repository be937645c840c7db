"""Memory of a training step: activations from a pass over fake tensors, everything else in closed form."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from llm2clip_plugin.train.deepspeed_config import offloads_optimizer

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made under it: those alive now, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked of fake tensors more often than everything else together
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._add(out)
        else:
            tree_map_only(Tensor, self._add, out)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:  # else a view, or the result of an operation in place
            self._storages.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


def activation_bytes(
    module: nn.Module, make_inputs: Callable[[], Sequence[Tensor]], forward: Callable[..., Tensor]
) -> int:
    """Bytes that a forward and backward pass adds, at its peak, to parameters, buffers, gradients and inputs.

    The pass is real (attention kernels, gradient checkpointing, gradients in flight), its tensors are fake: shapes
    without values, so that a model of any size takes seconds and no memory. ``module`` (on the meta device) is left
    with fake tensors; ``forward`` calls it on the inputs and returns a scalar. What a kernel allocates internally is
    not counted.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as memory:
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        inputs = make_inputs()
        at_rest = memory.peak = memory.live
        forward(*inputs).backward()
    return memory.peak - at_rest


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """What the memory of a rank follows from, the same on all ranks."""

    precision: str
    trained: int  # parameters that train
    frozen_bytes: float  # of the parameters that don't
    parameters: int  # all of them
    pair_bytes: float  # activations of a pair: activation_bytes over the pairs of the pass
    width: int  # of a feature
    state_bytes: float  # of the optimizer's states of a parameter: OptimizerSpec.state_bytes
    pixels: int = 0  # values of an image; 0 for texts
    averages: int = 0  # fp32 copies of what trains: a moving average, the averages of the frozen tower
    frozen_tower_bytes: float = 0.0  # that loss terms compare with, whole on every rank
    patches: int = 0  # fp32 values of an image that terms over patches hold: patches, gradients, a reference's


def rank_bytes(
    memory: StepMemory, zero: dict[str, Any], *, world: int, global_batch: int, micro_batch: int
) -> dict[str, float]:
    """Expected bytes of one rank by what they hold; ``zero`` is DeepSpeed's zero_optimization section.

    ZeRO-1 partitions the optimizer's states and the averages, ZeRO-2 gradients too, ZeRO-3 weights too (Rajbhandari et
    al. 2020, arXiv 1910.02054, section 5). Fp32 masters are added except under ZeRO-0; bf16 gradients of several
    micro-batches are summed in fp32. CUDA's context and the allocator's gaps come on top.
    """
    stage, size = int(zero.get("stage", 0)), BYTES[memory.precision]
    local = global_batch // world
    summed = 4 if memory.precision == "bf16" and micro_batch < local else 0
    shares = [world if stage >= first else 1 for first in (1, 2, 3)]  # ranks that share states, gradients, weights
    states = memory.state_bytes + (4 if stage else 0)
    parts = {
        "weights": (memory.trained * size + memory.frozen_bytes) / shares[2],
        "gradients": memory.trained * (size + summed) / shares[1],
        "AdamW": memory.trained * states / shares[0],
    }
    if memory.averages:
        parts["averages"] = memory.trained * memory.averages * 4 / shares[0]
    if memory.frozen_tower_bytes:
        parts["frozen tower"] = memory.frozen_tower_bytes
    if offloads_optimizer({"zero_optimization": zero}):
        parts.pop("AdamW")  # in the host's memory
    parts["activations"] = micro_batch * memory.pair_bytes
    if memory.pixels:
        parts["images"] = memory.pixels * (local + micro_batch * size)  # bytes, and a micro-batch normalized
    if memory.patches:
        parts["patches"] = 4.0 * memory.patches * local
    # both sides of the local batch and all ranks' texts, with gradients; logits in blocks of at most 512 MiB, three at
    # once
    parts["loss"] = 8 * memory.width * (2 * local + global_batch) + 3 * min(4 * local * global_batch, 1 << 29)
    parts["buckets"] = bucket_bytes(memory, zero)
    return parts


def bucket_bytes(memory: StepMemory, zero: dict[str, Any]) -> float:
    """DeepSpeed's gradient buckets (two with overlap_comm), and the full weights that ZeRO-3 has gathered at once."""
    stage, size = int(zero.get("stage", 0)), BYTES[memory.precision]
    if stage == 0:
        return 0.0
    bucket = float(zero.get("reduce_bucket_size", 5e8)) * size * (2 if zero.get("overlap_comm") else 1)
    gathered = min(float(zero.get("stage3_max_live_parameters", 1e9)) / memory.parameters, 1.0) if stage == 3 else 0.0
    return bucket + gathered * (memory.trained * size + memory.frozen_bytes)
