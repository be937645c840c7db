"""Memory of a training step: activations from a pass over fake tensors, everything else in closed
form. A plan prints it; a run asks whether its activations fit."""

import math
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from llm2clip_plugin.precision import DTYPES
from llm2clip_plugin.train.config import (
    OptimConfig,
    TowerConfig,
    TrainConfig,
    local_world_size,
)
from llm2clip_plugin.train.distributed import rank, world_size
from llm2clip_plugin.train.losses.base import ChosenTerms, needs_reference, patch_layers
from llm2clip_plugin.train.model import enable_gradient_checkpointing, shape_dual
from llm2clip_plugin.train.optim import chosen_optimizer, offloads_optimizer
from llm2clip_plugin.vision.directory import DualConfig

GIB = 1 << 30
# fraction of a GPU's memory that a plan fills; CUDA and the allocator's gaps have the rest
FILLED = 0.9
IMAGES = 16  # of the pass that measures a tower's activations


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made under it: those alive now, and the most that were alive
    at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # asked of fake tensors more often than everything else together
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, out)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        # else a view, or the result of an operation in place
        if key not in self._storages:
            self._storages.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


def activation_bytes(
    module: nn.Module,
    make: Callable[[], Sequence[Tensor]],
    forward: Callable[..., Tensor],
) -> int:
    """Bytes that a forward and backward pass adds, at its peak, to parameters, buffers, gradients
    and inputs.

    The pass is real, its tensors are fake: shapes without values, so that a model of any size takes
    seconds and no memory. ``module`` (on the meta device) is left with fake tensors; ``forward``
    calls it on the inputs and returns a scalar; ``make`` makes those. What a kernel allocates
    internally is not counted.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as memory:
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        inputs = make()
        at_rest = memory.live
        memory.peak = at_rest
        forward(*inputs).backward()
    return memory.peak - at_rest


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """What the memory of a rank follows from, the same on all ranks."""

    precision: str
    trained: int  # parameters that train
    frozen_bytes: float  # of the parameters that don't
    parameters: int  # all of them
    # activations of a pair: activation_bytes over the pairs of the pass
    pair_bytes: float
    width: int  # of a feature
    state_bytes: float  # of the optimizer's states of a parameter
    pixels: int = 0  # values of an image; 0 for texts
    # fp32 copies of what trains: the exported average, that of the reference tower
    averages: int = 0
    # of the tower that loss terms compare with, whole on every rank
    reference_bytes: float = 0.0
    # fp32 values of an image that terms over patches hold: patches, gradients, a reference's
    patches: int = 0


def rank_bytes(
    memory: StepMemory,
    zero: dict[str, Any],
    *,
    world: int,
    global_batch: int,
    micro_batch: int,
) -> dict[str, float]:
    """Expected bytes of one rank by what they hold; ``zero`` is DeepSpeed's zero_optimization
    section.

    ZeRO-1 partitions the optimizer's states and the averages, ZeRO-2 gradients too, ZeRO-3 weights
    too (Rajbhandari et al. 2020, arXiv 1910.02054, section 5). Fp32 masters are added except under
    ZeRO-0; bf16 gradients of several micro-batches are summed in fp32. CUDA's context and the
    allocator's gaps come on top.
    """
    stage = int(zero.get("stage", 0))
    size = DTYPES[memory.precision].itemsize
    local = global_batch // world
    summed = 4 if memory.precision == "bf16" and micro_batch < local else 0
    # ranks that share states, gradients, weights
    shares = [world if stage >= first else 1 for first in (1, 2, 3)]
    states = memory.state_bytes + (4 if stage else 0)
    parts = {
        "weights": (memory.trained * size + memory.frozen_bytes) / shares[2],
        "gradients": memory.trained * (size + summed) / shares[1],
        "AdamW": memory.trained * states / shares[0],
    }
    # this rank's gradients once more, in fp32, for the update; activations are free by then
    flat = 0.0
    if stage in (1, 2) and not offloads_optimizer({"zero_optimization": zero}):
        flat = memory.trained * (4 + size % 4) / world
    # of gradients (two with overlap_comm), and the full weights that ZeRO-3 has gathered at once
    buckets = 0.0
    if stage:
        count = 2 if zero.get("overlap_comm") else 1
        buckets = float(zero.get("reduce_bucket_size", 5e8)) * size * count
    if stage == 3:
        gathered = min(
            float(zero.get("stage3_max_live_parameters", 1e9)) / memory.parameters, 1.0
        )
        buckets += gathered * (memory.trained * size + memory.frozen_bytes)
    if offloads_optimizer({"zero_optimization": zero}):
        parts.pop("AdamW")  # in the host's memory
    # both sides of the local batch and all ranks' texts, with gradients
    features = 8 * memory.width * (2 * local + global_batch)
    # three blocks of at most 512 MiB of logits
    logits = 3 * min(4 * local * global_batch, 1 << 29)
    parts |= {
        "averages": memory.trained * memory.averages * 4 / shares[0],
        "reference tower": memory.reference_bytes,
        "activations": max(micro_batch * memory.pair_bytes, flat),
        # bytes, and a micro-batch normalized
        "images": memory.pixels * (local + micro_batch * size),
        "patches": 4.0 * memory.patches * local,
        "loss": features + logits,
        "buckets": buckets,
    }
    return {name: value for name, value in parts.items() if value or name == "buckets"}


def rank_gib(
    memory: StepMemory,
    zero: dict[str, Any],
    train: TrainConfig,
    world: int,
    micro_batch: int,
) -> float:
    """Expected memory of a rank, in GiB."""
    parts = rank_bytes(
        memory,
        zero,
        world=world,
        global_batch=train.global_batch,
        micro_batch=micro_batch,
    )
    return sum(parts.values()) / GIB


def fits(
    memory: StepMemory,
    deepspeed: dict[str, Any],
    train: TrainConfig,
    *,
    world: int,
    gib: float,
) -> bool:
    """Whether a rank's memory holds what a step needs."""
    _, micro_batch, _ = train.rows(world)
    zero = deepspeed["zero_optimization"]
    needed = rank_gib(memory, zero, train, world, micro_batch)
    return needed <= FILLED * gib


def tower_memory(
    tower: TowerConfig,
    dual: DualConfig,
    terms: ChosenTerms,
    optim: OptimConfig,
    train: TrainConfig,
    *,
    captions_per_image: int,
    checkpointing: bool,
) -> StepMemory:
    """What a step of stage 2 needs, measured on fake tensors; ``checkpointing``: with gradient
    checkpointing."""
    model = shape_dual(tower, dual)
    shape = model.tower.config
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tower_parameters = sum(p.numel() for p in model.tower.parameters())
    dtype = DTYPES[train.precision]
    pixels = (3, shape.image_size, shape.image_size)
    if checkpointing:
        enable_gradient_checkpointing(model.tower)
    layers = patch_layers(terms)

    def make_inputs() -> tuple[Tensor, Tensor]:
        captions = (IMAGES, captions_per_image, dual.llm_width)
        return torch.empty(IMAGES, *pixels, dtype=dtype), torch.empty(captions)

    def forward(*inputs: Tensor) -> Tensor:
        features = [
            feature for feature in model(*inputs, **layers) if feature is not None
        ]
        return sum((feature.sum() for feature in features), torch.zeros(()))

    of_patch = {
        "patches": 3 * shape.hidden_size,
        "patch_features": 2 * dual.projection_dim,
    }
    patches = (shape.image_size // shape.patch_size) ** 2
    has_average = bool(train.ema_decay)
    has_reference = needs_reference(terms)
    reference_bytes = 0.0
    if has_reference:
        reference_bytes = tower_parameters * dtype.itemsize
    return StepMemory(
        precision=train.precision,
        trained=trained,
        frozen_bytes=(parameters - trained) * dtype.itemsize,
        parameters=parameters,
        pair_bytes=activation_bytes(model.to(dtype), make_inputs, forward) / IMAGES,
        width=dual.projection_dim,
        state_bytes=chosen_optimizer(optim).state_bytes,
        pixels=math.prod(pixels),
        averages=[has_average, has_reference].count(True),
        reference_bytes=reference_bytes,
        patches=patches * sum(of_patch[reads] for reads in layers),
    )


def recomputes(
    train: TrainConfig,
    deepspeed: dict[str, Any],
    device: torch.device,
    measure: Callable[[], StepMemory],
) -> bool:
    """Whether this rank recomputes the tower's blocks: as set, or where its memory would not hold
    their activations. ``measure``: what a step needs without gradient checkpointing."""
    if train.gradient_checkpointing != "auto":
        return train.gradient_checkpointing
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        total = host // local_world_size()  # this rank's share
    gib = total / GIB
    on = not fits(measure(), deepspeed, train, world=world_size(), gib=gib)
    if rank() == 0:
        print(
            f"gradient checkpointing (auto): {'on' if on else 'off'}, with {gib:.0f} GiB"
        )
    return on
