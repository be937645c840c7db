"""Which of transformers' attentions a tower trains with."""

from __future__ import annotations

from typing import Any

import torch


def use_fastest_attention(tower: Any, device: torch.device, *, bf16: bool) -> None:
    """Leave ``tower`` the fused attention that transformers chose, but not in bf16 on the CPU.

    There torch's fused kernel (2.13) takes two to four times as long in a backward pass over 17 to 200 tokens as two
    matrix products with a softmax between them; the values are the same but for rounding.
    """
    if device.type == "cpu" and bf16 and getattr(tower, "_supports_sdpa", False):
        tower.set_attn_implementation("eager")
