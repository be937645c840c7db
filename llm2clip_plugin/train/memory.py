"""Memory of a training step, from shapes alone: weights, gradients, optimizer, what autograd keeps of a forward pass.

The last one is counted, not guessed: two blocks of the tower run on a small image under hooks that see every tensor
kept for the backward pass, and all of that grows with the tokens. What comes out is the closed form of Korthikanti et
al. 2022 (arXiv 2205.05198, section 4.1) without dropout and without the matrix of attention weights, which
scaled_dot_product_attention doesn't keep: of a block 16 values a token and channel with GELU and a hidden layer four
times as wide (tests/train/test_memory.py has it for every family).

Shapes: T tokens, H width of the tower, W width of an LLM embedding, D joint width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip_plugin.train.deepspeed_config import offloads_optimizer
from llm2clip_plugin.vision.dual import DualConfig, DualEncoder
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.family import Tower
from llm2clip_plugin.vision.towers import tower_blocks

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# gradients that are alive while a block is differentiated, as a share of what the block kept; measured peaks are
# .80 to 1.01 of the sum (tests/train/test_memory.py)
IN_FLIGHT = 0.25
PROBE_GRID = 8  # patches a side of the image that is counted with


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes of one image that stay in memory between forward and backward pass."""

    block: int  # of one block
    state: int  # of a block's input alone, T x H: what gradient checkpointing keeps
    rest: int  # outside the blocks, the pixels with it
    blocks: int  # blocks that keep something: those that train, and all above them

    def times(self, factor: float) -> Kept:
        """The same for ``factor`` times as many tokens."""
        sizes = (round(size * factor) for size in (self.block, self.state, self.rest))
        return Kept(**dict(zip(("block", "state", "rest"), sizes, strict=True)), blocks=self.blocks)

    def peak(self, *, checkpointing: bool, at_once: float = 1.0, in_flight: float = IN_FLIGHT) -> float:
        """Bytes an image at the start of the backward pass, where most is alive; the rest: see Model."""
        inside = self.blocks * (self.state if checkpointing else self.block)
        block = self.block * at_once if self.blocks else 0
        again = block if checkpointing else 0  # one block at a time is computed again
        return inside + again + self.rest + in_flight * block


def kept_by_tower(tower: Tower, precision: str) -> Kept:
    """Count what a tower (on the meta device, frozen and with LoRA as it will train) keeps of one image."""
    one, two = (_kept_by_last_blocks(tower, count, DTYPES[precision]) for count in (1, 2))
    trained = [any(p.requires_grad for p in block.parameters()) for block in tower_blocks(tower)]
    blocks = len(trained) - trained.index(True) if any(trained) else 0
    block = two - one if blocks else 0
    state = tokens_of(tower) * tower.config.hidden_size * BYTES[precision]
    return Kept(block=block, state=state, rest=one - block, blocks=blocks)


def tokens_of(tower: Tower) -> int:
    """Patches, and the class token where there is one."""
    return (tower.config.image_size // tower.config.patch_size) ** 2 + family_of(tower).has_cls


def _kept_by_last_blocks(tower: Tower, count: int, dtype: torch.dtype) -> int:
    """Bytes kept of one black image by the tower with its last ``count`` blocks alone, weights all zero."""
    small = copy.deepcopy(tower)
    blocks = tower_blocks(small)
    del blocks[: max(0, len(blocks) - count)]
    small = small.to(dtype).to_empty(device="cpu").train()
    for tensor in (*small.parameters(), *small.buffers()):
        tensor.data.zero_()
    size = small.config.image_size
    return kept_bytes(small, lambda: small(pixel_values=torch.zeros(1, 3, size, size, dtype=dtype)).pooler_output)


def kept_bytes(module: nn.Module, forward: Any) -> int:
    """Bytes of the distinct storages that autograd keeps while ``forward`` runs, parameters and buffers apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()  # held until all is counted: freed storages would give their addresses to others
    del output
    return sum(found.values())


def kept_by_adapter(config: DualConfig, precision: str) -> int:
    """Bytes that the text adapter keeps of one caption: a block its input, its norm's output, and the hidden layer
    before and after GELU (2 x expansion); then the last norm's input and output."""
    depth = config.adapter_blocks if config.adapter == "mlp" else 0
    values = depth * (2 + 2 * config.adapter_expansion) + 2
    return config.llm_width * values * BYTES[precision]


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the memory of a rank depends on that is the same on all ranks."""

    precision: str
    checkpointing: bool  # gradient checkpointing
    trained: int  # parameters that train
    frozen: int  # parameters that rest
    kept: Kept
    kept_text: int  # bytes that the text adapter keeps of one caption
    projection_dim: int
    pixels: int  # values of one image
    state_bytes: float = 8.0  # of the optimizer's moments of one parameter: OptimizerSpec.state_bytes
    frozen_size: float = 0.0  # bytes of a parameter that rests; 0: as of one that trains
    at_once: float = 1.0  # share of a micro-batch that a block sees in one call
    in_flight: float = IN_FLIGHT  # gradients alive in a block, as a share of what the block keeps

    @property
    def peak(self) -> float:
        """Bytes that an image adds to the peak."""
        return self.kept.peak(checkpointing=self.checkpointing, at_once=self.at_once, in_flight=self.in_flight)


def model_of(dual: DualEncoder, small: Tower, precision: str, *, checkpointing: bool) -> Model:
    """The numbers of a dual encoder (on the meta device, frozen and with LoRA as it will train); ``small`` is its tower
    at a size that is quickly counted with."""
    counts = {flag: sum(p.numel() for p in dual.parameters() if p.requires_grad is flag) for flag in (True, False)}
    return Model(
        precision=precision,
        checkpointing=checkpointing,
        trained=counts[True],
        frozen=counts[False],
        kept=kept_by_tower(small, precision).times(tokens_of(dual.tower) / tokens_of(small)),
        kept_text=kept_by_adapter(dual.config, precision),
        projection_dim=dual.config.projection_dim,
        pixels=3 * dual.tower.config.image_size**2,
    )


def rank_bytes(
    model: Model, zero: dict[str, Any], *, world: int, global_batch: int, micro_batch: int
) -> dict[str, float]:
    """Expected bytes of one rank by what they hold; ``zero`` is DeepSpeed's zero_optimization section.

    ZeRO-1 divides the optimizer's part by the ranks, ZeRO-2 gradients too, ZeRO-3 weights too (Rajbhandari et al. 2020,
    arXiv 1910.02054, section 5). It has its moments, and fp32 masters but for ZeRO-0; bf16 gradients of several
    micro-batches are summed in fp32. CUDA's own context and the allocator's gaps come on top.
    """
    stage, size = int(zero.get("stage", 0)), BYTES[model.precision]
    share = global_batch // world
    summed = 4 if model.precision == "bf16" and micro_batch < share else 0
    each = {"weights": size, "gradients": size + summed, "AdamW": model.state_bytes + (4 if stage else 0)}
    cut = {"weights": stage >= 3, "gradients": stage >= 2, "AdamW": stage >= 1}
    found = {name: model.trained * value / (world if cut[name] else 1) for name, value in each.items()}
    resting = model.frozen * (model.frozen_size or size)
    found["weights"] += resting / (world if stage >= 3 else 1)
    if offloads_optimizer({"zero_optimization": zero}):
        found.pop("AdamW")  # on the host
    found["activations"] = micro_batch * (model.peak + model.kept_text)
    if model.pixels:
        found["images"] = share * model.pixels * size
    # both sides of the share and all ranks' texts, with gradients; logits in blocks of 512 MiB at most, three at once
    found["loss"] = 8 * model.projection_dim * (2 * share + global_batch) + 3 * min(4 * share * global_batch, 1 << 29)
    found["buckets"] = bucket_bytes(zero, size, model.trained + model.frozen, model.trained * size + resting)
    return found


def bucket_bytes(zero: dict[str, Any], size: int, parameters: int, weights: float) -> float:
    """DeepSpeed's own: buckets of gradients (two with overlap_comm), and the whole weights that ZeRO-3 has gathered.

    size: bytes of a gradient; weights: bytes of all parameters.
    """
    stage, default = int(zero.get("stage", 0)), 5e8  # values, DeepSpeed's own defaults
    if stage == 0:
        return 0.0
    bucket = float(zero.get("reduce_bucket_size", default)) * size * (2 if zero.get("overlap_comm") else 1)
    live = min(float(zero.get("stage3_max_live_parameters", 1e9)) / parameters, 1.0) if stage == 3 else 0.0
    return bucket + live * weights
