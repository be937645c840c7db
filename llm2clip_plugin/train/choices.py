"""Types and defaults that settings share with the code that they set; without torch."""

from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
ReductionType = Literal["", "fp32", "bf16", "fp16"]
Tf32 = Literal["auto", "on", "off"]
DDP_TIMEOUT = 1800.0  # seconds, as in Hugging Face's Trainer; torch's is 600 on NCCL, DeepSpeed's 600 since 0.19.6
STRAGGLER_SECONDS = 300.0  # without progress, after which a rank is named
