"""bitsandbytes' 8-bit AdamW: a quarter of AdamW's optimizer states.

Dettmers et al. 2022 (arXiv 2110.02861): moments are stored in 8 bits, as an index into a table of 256 values from -1
(0 for exp_avg_sq) to 1 times the largest magnitude of their block of 256. A master smaller than ``min_8bit_size`` keeps
fp32 moments.

The blocks of a master end where no parameter does, so a checkpoint holds each rank's states as they are: a run resumes
bit for bit, on as many ranks at the same ZeRO stage.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llm2clip_plugin.train.optimizers.base import OptimizerSpec, State

BLOCK = 256  # values that share a magnitude, in bitsandbytes


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(OptimizerSpec):
    """``--optimizer adamw_8bit``, as Hugging Face's Trainer calls it."""

    min_8bit_size: int = 4096  # values of a master from which its moments are in 8 bits

    name: ClassVar[str] = "adamw_8bit"
    moments: ClassVar[tuple[str, ...]] = ("state1", "absmax1", "state2", "absmax2")  # bitsandbytes' names
    by_rank: ClassVar[bool] = True
    state_bytes: ClassVar[float] = 2 * (1 + 4 / BLOCK)

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        try:
            from bitsandbytes.optim import AdamW8bit as Optimizer
        except ImportError as error:
            raise ValueError("optim.name adamw_8bit needs bitsandbytes: pip install bitsandbytes") from error
        return Optimizer(groups, lr=lr, betas=betas, eps=eps, min_8bit_size=self.min_8bit_size)

    def empty_state(self, optimizer: Any, master: Tensor, updates: int) -> State:
        in_8bit = master.numel() >= self.min_8bit_size
        state: State = {"step": updates}
        for number in (1, 2):
            state[f"state{number}"] = torch.zeros_like(master.data, dtype=torch.uint8 if in_8bit else torch.float32)
            if in_8bit:
                blocks = -(-master.numel() // BLOCK)
                state[f"absmax{number}"] = torch.zeros(blocks, dtype=torch.float32, device=master.device)
                table = optimizer.name2qmap["dynamic" if number == 1 else "udynamic"]
                state[f"qmap{number}"] = table.to(master.device)
        return state


OPTIMIZER = AdamW8bit
