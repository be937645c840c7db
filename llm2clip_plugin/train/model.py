"""Build the dual encoder for training, freeze parts of it, and set learning rates per parameter."""

import dataclasses
import warnings

import torch
from torch import nn

from llm2clip_plugin.train.config import OptimConfig, TowerConfig
from llm2clip_plugin.train.optim import Trained, is_vector
from llm2clip_plugin.vision.dual import DualEncoder, load_heads
from llm2clip_plugin.vision.family import DualConfig
from llm2clip_plugin.vision.towers import (
    add_lora,
    freeze_tower,
    load_tower,
    meta_tower,
    new_tower,
    parameters_in,
    pretrained_log_scale,
    tower_blocks,
    tower_embeddings_parameters,
    use_quick_gelu,
)


def with_llm_width(config: DualConfig, width: int) -> DualConfig:
    """``config`` with ``llm_width`` set to the cache's width, and without an adapter the joint width, too.

    Raises ValueError if ``llm_width`` is set to another one.
    """
    if config.llm_width not in (0, width):
        raise ValueError(
            f"dual.llm_width is {config.llm_width}, but the embedding cache has width {width}; "
            "leave it unset, or use a cache of that width"
        )
    joint = width if config.adapter == "none" else config.projection_dim
    return dataclasses.replace(config, llm_width=width, projection_dim=joint)


def build_dual(tower: TowerConfig, dual: DualConfig, *, seed: int) -> DualEncoder:
    """Load the tower, add heads (initialized with ``seed``, or the directory's), freeze parts as configured.

    An unset dual.logit_scale_init is the tower's own scale, where its source has one.
    With tower.from_scratch the tower, too, is initialized with ``seed``. Raises ValueError if no tower is set.
    """
    if tower.from_scratch:
        torch.manual_seed(seed)
        vision = new_tower(tower.architecture, image_size=tower.image_size or None)
        return _trainable(DualEncoder(vision, dual), tower)
    if not tower.path:
        hint = (
            f"; create {tower.architecture} with `llm2clip import CHECKPOINT --output towers/{tower.architecture}`"
            if tower.architecture
            else ""
        )
        raise ValueError(f"no tower to train: set --tower to a directory or Hub id{hint}")
    vision = load_tower(tower.path, dtype=torch.float32, image_size=tower.image_size or None)
    if dual.logit_scale_init is None:
        dual = dataclasses.replace(dual, logit_scale_init=pretrained_log_scale(tower.path))
    torch.manual_seed(seed)
    model = DualEncoder(vision, dual)
    if tower.keep_heads:
        load_heads(model, tower.path)
    return _trainable(model, tower)


def shape_dual(tower: TowerConfig, dual: DualConfig) -> DualEncoder:
    """The model of ``build_dual`` on the meta device: shapes and what trains, without weights or downloads.

    Raises ValueError if the architecture is unknown, FileNotFoundError for a directory without config.json.
    """
    source = tower.path or tower.architecture
    if not source:
        raise ValueError("no tower to plan for: set --tower, or set --architecture to a known architecture")
    with torch.device("meta"):
        return _trainable(DualEncoder(meta_tower(source, image_size=tower.image_size or None), dual), tower)


def _trainable(model: DualEncoder, tower: TowerConfig) -> DualEncoder:
    """The model in training mode, with the QuickGELU for training, and LoRA or frozen parts as configured."""
    use_quick_gelu(model.tower)
    if tower.lora_rank:
        add_lora(model.tower, rank=tower.lora_rank, alpha=tower.lora_alpha)
    if tower.freeze:
        freeze_tower(model.tower)
    elif tower.freeze_first_blocks:
        freeze_tower(model.tower, first_blocks=tower.freeze_first_blocks)
    return model.train()


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute a tower's or an LLM's blocks in the backward pass instead of keeping their activations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5 renames the method, 4.37 has this name alone
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def trained_parameters(model: DualEncoder, config: OptimConfig) -> list[Trained]:
    """Every trained parameter, with its peak learning rate and whether weight decay applies.

    Depth 0 is the embeddings, 1 to L the blocks, L + 1 what follows them in the tower (final norm, pooling head) and
    ``config.full_lr``, at the full rate. Position tables have no weight decay, the patch convolution has.
    """
    blocks = tower_blocks(model.tower)
    depth = {id(p): number + 1 for number, block in enumerate(blocks) for p in block.parameters()}
    embeddings = {id(p) for p in tower_embeddings_parameters(model.tower)}
    top = len(blocks) + 1
    depth |= dict.fromkeys(embeddings, 0)
    depth |= {id(p): top for p in parameters_in(model.tower, config.full_lr)}
    trained = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("tower."):
            lr = config.lr * config.layer_decay ** (top - depth.get(id(parameter), top))
        else:
            lr = config.head_lr or config.lr
        table = id(parameter) in embeddings and parameter.ndim != 4
        decay = not is_vector(parameter) and not table
        trained.append(Trained(name=name, parameter=parameter, lr=lr, decay=decay))
    return trained
