"""Build the dual encoder for training, freeze parts of it, and set learning rates per parameter."""

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from llm2clip_plugin.train.config import OptimConfig, TowerConfig
from llm2clip_plugin.train.optim import Trained, is_vector, offloads_optimizer
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder, load_heads
from llm2clip_plugin.vision.towers import (
    add_lora,
    freeze_tower,
    initial_log_scale,
    load_tower,
    new_tower,
    parameters_in,
    tower_blocks,
    tower_embeddings_parameters,
    use_quick_gelu,
)


def with_llm_width(config: DualConfig, width: int) -> DualConfig:
    """``config`` with the cache's width as ``llm_width``, and without an adapter as the joint
    width, too; ValueError if ``llm_width`` is set to another one."""
    if config.llm_width not in (0, width):
        raise ValueError(
            f"dual.llm_width {config.llm_width}, but the cache has width {width}; leave it unset"
        )
    joint = width if config.adapter == "none" else config.projection_dim
    return dataclasses.replace(config, llm_width=width, projection_dim=joint)


def build_dual(tower: TowerConfig, dual: DualConfig, *, seed: int) -> DualEncoder:
    """Load the tower, add heads (initialized with ``seed``, or the directory's), freeze parts as
    configured.

    An unset dual.logit_scale_init is the tower's own scale, else its family's. With
    tower.from_scratch the tower, too, is initialized with ``seed``. Raises ValueError if no tower
    is set.
    """
    if tower.from_scratch:
        torch.manual_seed(seed)
        vision = new_tower(tower.architecture, image_size=tower.image_size or None)
        return _trainable(DualEncoder(vision, dual), tower)
    if not tower.path:
        wanted = (
            f" (made by `llm2clip import` for {tower.architecture})" if tower.architecture else ""
        )
        raise ValueError(f"no tower to train: set --tower to a directory{wanted} or Hub id")
    vision = load_tower(tower.path, dtype=torch.float32, image_size=tower.image_size or None)
    if dual.logit_scale_init is None:
        log_scale = initial_log_scale(tower.path, vision)
        dual = dataclasses.replace(dual, logit_scale_init=log_scale)
    torch.manual_seed(seed)
    model = DualEncoder(vision, dual)
    if tower.keep_heads:
        load_heads(model, tower.path)
    return _trainable(model, tower)


def shape_dual(tower: TowerConfig, dual: DualConfig) -> DualEncoder:
    """The model of ``build_dual`` on the meta device: shapes and what trains, without weights or
    downloads."""
    source = tower.path or tower.architecture
    if not source:
        raise ValueError(
            "no tower to plan for: set --tower, or set --architecture to a known architecture"
        )
    with torch.device("meta"):
        model = new_tower(source, image_size=tower.image_size or None, device="meta")
        return _trainable(DualEncoder(model, dual), tower)


def _trainable(model: DualEncoder, tower: TowerConfig) -> DualEncoder:
    """The model in training mode, with the QuickGELU for training, and LoRA or frozen parts as
    configured."""
    use_quick_gelu(model.tower)
    if tower.lora_rank:
        add_lora(model.tower, rank=tower.lora_rank, alpha=tower.lora_alpha)
    if tower.freeze:
        freeze_tower(model.tower)
    elif tower.freeze_first_blocks:
        freeze_tower(model.tower, first_blocks=tower.freeze_first_blocks)
    return model.train()


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute a tower's or an LLM's blocks in the backward pass instead of keeping their
    activations."""
    with warnings.catch_warnings():
        # transformers 5 renames the method, 4.37 has this name alone
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


# dropout draws what it draws in eager mode: both passes of gradient caching must draw the same
COMPILER: dict[str, Any] = {"backend": "inductor", "options": {"fallback_random": True}}


def compile_blocks(blocks: Iterable[nn.Module], *, dynamic: bool) -> None:
    """``torch.compile`` the forward pass of each block, in place. Equal blocks share a graph, made
    by the first call.

    Block by block, so that a backward pass hands over gradients as it goes, which ZeRO sends
    meanwhile, and so that hooks and gradient checkpointing stay around a block. dynamic: batch and
    length change between calls.
    """
    from torch.fx.experimental import _config as shapes  # not in LLaVA's torch

    shapes.use_duck_shape = False  # two sizes of the first batch may be equal by chance
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=dynamic, **COMPILER)


def trained_parameters(model: DualEncoder, config: OptimConfig) -> list[Trained]:
    """Every trained parameter, with its peak learning rate and whether weight decay applies.

    Depth 0 is the embeddings, 1 to L the blocks, L + 1 what follows them in the tower (final norm,
    pooling head) and ``config.full_lr``, at the full rate. Position tables have no weight decay,
    the patch convolution has.
    """
    blocks = tower_blocks(model.tower)
    embeddings = {id(p) for p in tower_embeddings_parameters(model.tower)}
    top = len(blocks) + 1
    depth = {id(p): number + 1 for number, block in enumerate(blocks) for p in block.parameters()}
    depth |= dict.fromkeys(embeddings, 0)
    depth |= {id(p): top for p in parameters_in(model.tower, config.full_lr)}
    trained = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = config.head_lr or config.lr
        if name.startswith("tower."):
            lr = config.lr * config.layer_decay ** (top - depth.get(id(parameter), top))
        # NaFlex's is linear
        table = id(parameter) in embeddings and parameter.ndim != 4 and "patch_embed" not in name
        decay = not is_vector(parameter) and not table
        trained.append(Trained(name=name, parameter=parameter, lr=lr, decay=decay))
    return trained


# Memory of a training step: activations from a pass over fake tensors, everything else in closed
# form.

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made under it: those alive now, and the most that were alive
    at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
        if key not in self._storages:  # else a view, or the result of an operation in place
            self._storages.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


def activation_bytes(
    module: nn.Module, make: Callable[[], Sequence[Tensor]], forward: Callable[..., Tensor]
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
    pair_bytes: float  # activations of a pair: activation_bytes over the pairs of the pass
    width: int  # of a feature
    state_bytes: float  # of the optimizer's states of a parameter
    pixels: int = 0  # values of an image; 0 for texts
    # fp32 copies of what trains: a moving average, the averages of the frozen tower
    averages: int = 0
    frozen_tower_bytes: float = 0.0  # that loss terms compare with, whole on every rank
    # fp32 values of an image that terms over patches hold: patches, gradients, a reference's
    patches: int = 0


def rank_bytes(
    memory: StepMemory, zero: dict[str, Any], *, world: int, global_batch: int, micro_batch: int
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
        gathered = min(float(zero.get("stage3_max_live_parameters", 1e9)) / memory.parameters, 1.0)
        buckets += gathered * (memory.trained * size + memory.frozen_bytes)
    if offloads_optimizer({"zero_optimization": zero}):
        parts.pop("AdamW")  # in the host's memory
    # both sides of the local batch and all ranks' texts, with gradients
    features = 8 * memory.width * (2 * local + global_batch)
    # three blocks of at most 512 MiB of logits
    logits = 3 * min(4 * local * global_batch, 1 << 29)
    parts |= {
        "averages": memory.trained * memory.averages * 4 / shares[0],
        "frozen tower": memory.frozen_tower_bytes,
        "activations": max(micro_batch * memory.pair_bytes, flat),
        # bytes, and a micro-batch normalized
        "images": memory.pixels * (local + micro_batch * size),
        "patches": 4.0 * memory.patches * local,
        "loss": features + logits,
        "buckets": buckets,
    }
    return {name: value for name, value in parts.items() if value or name == "buckets"}
