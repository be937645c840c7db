"""AdamW with fp32 moments: torch's own, fused on GPUs."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llm2clip_plugin.train.optimizers.base import OptimizerSpec, State


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerSpec):
    """Loshchilov & Hutter 2019, arXiv 1711.05101."""

    name: ClassVar[str] = "adamw"
    supports_offload: ClassVar[bool] = True
    deepspeed_types: ClassVar[tuple[str, ...]] = ("Adam", "AdamW")
    deepspeed_settings: ClassVar[dict[str, Any]] = {}

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        # torch's own needs no C++ build, which takes minutes at first use; on CPUs the fused kernel rounds differently
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=torch.cuda.is_available())

    def empty_state(self, optimizer: torch.optim.Optimizer, master: Tensor, updates: int) -> State:
        # one step for each master: a shared tensor would advance once per master
        fused = bool(optimizer.defaults.get("fused"))
        step: Any = torch.tensor(float(updates), device=master.device if fused else "cpu")
        if not isinstance(optimizer, torch.optim.AdamW):  # DeepSpeedCPUAdam counts in Python
            step = updates
        return {"step": step, **{moment: torch.zeros_like(master.data) for moment in self.moments}}


OPTIMIZER = AdamW
