"""The dual encoder as training sees it: built, partly frozen, and its parameters with their learning rates."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from llm2clip_plugin.train.optim import OptimConfig, Trained, is_vector
from llm2clip_plugin.vision.dual import DualConfig, DualEncoder, load_heads
from llm2clip_plugin.vision.lora import add_lora
from llm2clip_plugin.vision.meta_tower import meta_tower
from llm2clip_plugin.vision.quick_gelu import use_quick_gelu
from llm2clip_plugin.vision.towers import freeze_tower, load_tower, tower_blocks, tower_embeddings_parameters


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """The vision tower to start from, and how much of it trains."""

    path: str = ""  # tower directory, Hugging Face directory or Hub id
    architecture: str = ""  # name of a known shape (eva02-l14-336 ...) that --dry-run plans with while path is empty
    image_size: int = 0  # pixels a side; positions are interpolated once. 0: the tower's own
    freeze: bool = False  # train the heads alone
    freeze_first_blocks: int = 0  # leave the embeddings and so many first blocks as they are
    keep_heads: bool = False  # go on from the tower directory's own projection, text adapter and logit scale
    lora_rank: int = 0  # train low-rank updates of the blocks' Linears instead of the tower (PEFT); 0: no
    lora_alpha: int = 32  # an update counts alpha / rank times

    def __post_init__(self) -> None:
        if self.lora_rank and (self.freeze or self.freeze_first_blocks):
            raise ValueError("tower.lora_rank rests the tower's own weights; leave tower.freeze* as they are")
        if self.freeze and self.freeze_first_blocks:
            raise ValueError("tower.freeze freezes all blocks; leave tower.freeze_first_blocks at 0")


def with_llm_width(config: DualConfig, width: int) -> DualConfig:
    """``config`` for a cache of that width; ValueError if it was made for another one."""
    if config.llm_width not in (0, width):
        raise ValueError(
            f"dual.llm_width is {config.llm_width}, the embedding cache is {width} wide; "
            "leave it at 0, or use the cache of the LLM that it was made for"
        )
    return dataclasses.replace(config, llm_width=width)


def build_dual(tower: TowerConfig, dual: DualConfig, *, seed: int) -> DualEncoder:
    """Load the tower, add heads that ``seed`` initialises (or the directory's), freeze what the configuration says."""
    if not tower.path:
        kind = f", a {tower.architecture}: `llm2clip import` makes one of its checkpoint" if tower.architecture else ""
        raise ValueError(f"no tower to train: say --tower.path (a directory or a Hub id{kind})")
    vision = load_tower(tower.path, dtype=torch.float32, image_size=tower.image_size or None)
    torch.manual_seed(seed)
    model = DualEncoder(vision, dual)
    if tower.keep_heads:
        load_heads(model, tower.path)
    return _with_rest(model, tower)


def shape_dual(tower: TowerConfig, dual: DualConfig) -> DualEncoder:
    """What ``build_dual`` would make, on the meta device: shapes and what trains, no weights, nothing downloaded.

    Raises ValueError if the shape of the tower is not known, FileNotFoundError for a directory without config.json.
    """
    source = tower.path or tower.architecture
    if not source:
        raise ValueError("no tower to plan with: say --tower.path, or --tower.architecture with a name that is known")
    with torch.device("meta"):
        return _with_rest(DualEncoder(meta_tower(source, image_size=tower.image_size or None), dual), tower)


def _with_rest(model: DualEncoder, tower: TowerConfig) -> DualEncoder:
    """The model in training mode, with training's own QuickGELU, and LoRA or frozen parts as configured."""
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
    """Every parameter that trains, with its peak learning rate and whether it decays.

    Depth 0 are the embeddings, 1 to L the blocks, L + 1 whatever stands behind them in the tower (final norm,
    pooling head), at the full rate as the heads are. Tables of positions don't decay, the patch convolution does.
    """
    blocks = tower_blocks(model.tower)
    depth = {id(p): number + 1 for number, block in enumerate(blocks) for p in block.parameters()}
    embeddings = {id(p) for p in tower_embeddings_parameters(model.tower)}
    depth |= dict.fromkeys(embeddings, 0)
    top = len(blocks) + 1
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


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the parameters that train."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
