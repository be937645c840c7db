"""QuickGELU for training: bit-equal to transformers', with less memory and a faster backward pass.

``x * sigmoid(1.702 x)`` in three operations saves x, the sigmoid and the product for backward. Since it equals
``silu(1.702 x) / 1.702``, its derivative is SiLU's at ``1.702 x``, for which torch has one kernel that needs x alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

FACTOR = 1.702


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(FACTOR * x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, FACTOR * x)


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return _QuickGELU.apply(x)  # pyright: ignore[reportReturnType]


def use_quick_gelu(tower: nn.Module) -> int:
    """Replace every QuickGELUActivation of transformers in ``tower``, in place; returns their number."""
    from transformers.activations import QuickGELUActivation

    places = [
        (module, name)
        for module in tower.modules()
        for name, child in module.named_children()
        if isinstance(child, QuickGELUActivation)
    ]
    for module, name in places:
        setattr(module, name, QuickGELU())
    return len(places)
