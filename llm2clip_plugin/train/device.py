"""How a device computes: TF32 in products of fp32 tensors, deterministic kernels."""

import os

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


def set_full_determinism() -> None:
    """Use deterministic kernels alone, before CUDA is initialized; an operation that has none raises RuntimeError.

    What Hugging Face's ``enable_full_determinism`` sets, without its seeds: every random draw here is a function of the
    run's seed anyway.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
