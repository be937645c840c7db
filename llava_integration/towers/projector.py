"""The width of features that a projector was trained for, checked before LLaVA fails with a bare shape mismatch."""

from __future__ import annotations

import re
from typing import Any

from llava_integration.towers.provenance import checkpoint_of
from llm2clip_plugin.contracts import ContractError

FIRST_LAYER = re.compile(r"mm_projector\.(0\.)?weight$")


def check_projector(name: str, hidden_size: int, config: Any) -> None:
    """Compare a tower's ``hidden_size`` with ``mm_hidden_size`` and with the weights of ``pretrain_mm_mlp_adapter``.

    ``config``: LLaVA's configuration or model arguments. Raises ContractError with both widths.
    """
    if trained := getattr(config, "mm_hidden_size", None):
        compare_widths(name, hidden_size, trained, checkpoint_of(config) or "the checkpoint")
    if adapter := getattr(config, "pretrain_mm_mlp_adapter", None):
        if (width := input_width(adapter)) is not None:
            compare_widths(name, hidden_size, width, adapter)


def compare_widths(name: str, hidden_size: int, trained: int, where: str) -> None:
    """Raise ContractError if the tower ``name`` does not give features of the width ``trained``."""
    if hidden_size != trained:
        raise ContractError(
            f"the projector of {where} expects features of width {trained}, but the tower {name!r} has hidden_size "
            f"{hidden_size}; use the tower that the projector was trained with (mm_vision_tower in its config.json), "
            "or pretrain a projector for this one"
        )


def input_width(adapter: str) -> int | None:
    """Input width of the projector in ``mm_projector.bin``; None if its first layer is not linear."""
    import torch

    weights = torch.load(adapter, map_location="cpu", weights_only=True)
    widths = [tensor.shape[1] for key, tensor in weights.items() if FIRST_LAYER.search(key) and tensor.ndim == 2]
    return widths[0] if widths else None
