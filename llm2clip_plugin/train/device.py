"""How a device computes products of fp32 tensors."""

import torch

from llm2clip_plugin.train.choices import Tf32


def set_tf32(tf32: Tf32, precision: str, device: torch.device) -> None:
    """Allow or forbid TF32, with 10 bits of mantissa, in products and convolutions of fp32 tensors on a GPU.

    auto: where the features come from half precision anyway, whose 7 or 10 bits round as much. torch's own defaults
    are no rule: they allow it in convolutions alone.
    """
    if device.type == "cuda":
        allowed = tf32 == "on" or (tf32 == "auto" and precision != "fp32")
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
