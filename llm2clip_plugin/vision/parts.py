"""The parts of a tower, by its family: blocks, embeddings, final norm; to freeze, train or evaluate
them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from llm2clip_plugin.vision.families import Tower, family_of


def tower_in(model: Any) -> Tower:
    """The tower of a dual encoder, or the model itself if it is a tower."""
    return model.tower if "tower" in dict(model.named_children()) else model


def core_prefix(tower: Tower) -> str:
    """``"vision_model."`` where transformers wraps the tower (CLIP and SigLIP in 4.x), else
    ``""``."""
    return "vision_model." if "vision_model" in dict(tower.named_children()) else ""


def tower_blocks(tower: Tower) -> nn.ModuleList:
    """The transformer blocks, first to last."""
    return tower.get_submodule(core_prefix(tower) + family_of(tower).blocks)


def parameters_in(tower: Tower, names: Iterable[str]) -> list[nn.Parameter]:
    """The parameters that ``names`` (of modules or parameters, without ``core_prefix``) stand
    for."""
    full_names = tuple(core_prefix(tower) + name for name in names)
    prefixes = tuple(f"{name}." for name in full_names)
    parameters: list[nn.Parameter] = []
    for name, parameter in tower.named_parameters():
        if name in full_names or name.startswith(prefixes):
            parameters.append(parameter)
    return parameters


def tower_embeddings_parameters(tower: Tower) -> list[nn.Parameter]:
    """The parameters below the first block: patch projection, positions, class token, a norm before
    the blocks."""
    return parameters_in(tower, family_of(tower).embeddings)


def final_norm(tower: Tower) -> nn.Module:
    """The norm after the last block; the identity of a family without one."""
    name = family_of(tower).final_norm
    return tower.get_submodule(core_prefix(tower) + name) if name else nn.Identity()


def freeze_tower(tower: Tower, *, first_blocks: int | None = None) -> None:
    """Stop gradients for all of the tower, or for its embeddings and its first blocks; ValueError
    if it has fewer."""
    if first_blocks is None:
        tower.requires_grad_(False)
        return
    blocks = tower_blocks(tower)
    if not 0 <= first_blocks <= len(blocks):
        raise ValueError(
            f"cannot freeze the first {first_blocks} blocks: the tower has {len(blocks)}"
        )
    if first_blocks:
        for parameter in tower_embeddings_parameters(tower):
            parameter.requires_grad_(False)
    for block in blocks[:first_blocks]:
        block.requires_grad_(False)


Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def eval_mode(model: Model) -> Iterator[Model]:
    """``model`` in eval mode; each submodule's mode is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training
