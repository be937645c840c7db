"""Build the dual encoder for training, freeze parts of it, and set learning rates per parameter."""

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llm2clip_plugin.train.config import OptimConfig, TowerConfig, TrainConfig
from llm2clip_plugin.train.optim import Trained, is_vector
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder, load_heads
from llm2clip_plugin.vision.fast import use_fastest_attention, use_quick_gelu
from llm2clip_plugin.vision.lora import add_lora
from llm2clip_plugin.vision.parts import (
    freeze_tower,
    parameters_in,
    tower_blocks,
    tower_embeddings_parameters,
)
from llm2clip_plugin.vision.towers import (
    Tower,
    initial_log_scale,
    load_tower,
    new_tower,
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
        wanted = ""
        if tower.architecture:
            wanted = f" (made by `llm2clip import` for {tower.architecture})"
        raise ValueError(
            f"no tower to train: set --tower to a directory{wanted} or Hub id"
        )
    vision = load_tower(
        tower.path, dtype=torch.float32, image_size=tower.image_size or None
    )
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


def accelerate(tower: Tower, config: TrainConfig, device: torch.device) -> None:
    """Compute with the attention that is fastest in the run's precision, and compile the blocks
    where the run asks for it."""
    use_fastest_attention(tower, device, bf16=config.precision == "bf16")
    if config.torch_compile:
        compile_blocks(tower_blocks(tower), dynamic=False)


def trained_parameters(model: DualEncoder, config: OptimConfig) -> list[Trained]:
    """Every trained parameter, with its peak learning rate and whether weight decay applies.

    Depth 0 is the embeddings, 1 to L the blocks, L + 1 what follows them in the tower (final norm,
    pooling head) and ``config.full_lr``, at the full rate. Position tables have no weight decay,
    the patch convolution has.
    """
    blocks = tower_blocks(model.tower)
    embeddings = {id(p) for p in tower_embeddings_parameters(model.tower)}
    top = len(blocks) + 1
    depth: dict[int, int] = {}  # by id of the parameter
    for number, block in enumerate(blocks, 1):
        depth |= {id(p): number for p in block.parameters()}
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
        embeds_patches = parameter.ndim == 4 or "patch_embed" in name
        table = id(parameter) in embeddings and not embeds_patches
        decay = not is_vector(parameter) and not table
        trained.append(Trained(name=name, parameter=parameter, lr=lr, decay=decay))
    return trained
