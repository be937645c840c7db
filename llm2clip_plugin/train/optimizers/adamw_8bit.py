"""bitsandbytes' 8-bit AdamW: a quarter of AdamW's optimizer states.

Dettmers et al. 2022 (arXiv 2110.02861): moments are stored in 8 bits, as an index into a table of 256 values from -1
(0 for exp_avg_sq) to 1 times the largest magnitude of their block of 256. A master smaller than ``min_8bit_size`` keeps
fp32 moments.

The blocks of a master end where no parameter does, so a checkpoint holds, for each parameter, the indices and the
magnitudes as (value, length) runs. On the same ranks under the same ZeRO stage every block is put together again as it
was, and the run continues bit for bit; otherwise the values are rounded once to the blocks of the new masters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.lazy_compile import BITSANDBYTES, import_without_compiler
from llm2clip_plugin.train.optimizers.base import OptimizerSpec, State

BLOCK = 256  # values that share a magnitude, in bitsandbytes
NO_MAGNITUDE = -1.0  # stands for the magnitudes of a moment that is in fp32
NUMBER = {"exp_avg": "1", "exp_avg_sq": "2"}  # bitsandbytes names its moments state1 and state2


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(OptimizerSpec):
    """``--optimizer adamw_8bit``, as Hugging Face's Trainer calls it."""

    min_8bit_size: int = 4096  # values of a master from which its moments are in 8 bits

    name: ClassVar[str] = "adamw_8bit"
    state_bytes: ClassVar[float] = 2 * (1 + 4 / BLOCK)

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        import_without_compiler(BITSANDBYTES)
        try:
            from bitsandbytes.optim import AdamW8bit as Optimizer
        except ImportError as error:
            raise ValueError("optim.name adamw_8bit needs bitsandbytes: pip install bitsandbytes") from error
        return Optimizer(groups, lr=lr, betas=betas, eps=eps, min_8bit_size=self.min_8bit_size)

    def empty_state(self, optimizer: Any, master: Tensor, updates: int) -> State:
        in_8bit = master.numel() >= self.min_8bit_size
        state: State = {"step": updates}
        for number in NUMBER.values():
            state[f"state{number}"] = torch.zeros_like(master.data, dtype=torch.uint8 if in_8bit else torch.float32)
            if in_8bit:
                blocks = -(-master.numel() // BLOCK)
                state[f"absmax{number}"] = torch.zeros(blocks, dtype=torch.float32, device=master.device)
                table = optimizer.name2qmap["dynamic" if number == "1" else "udynamic"]
                state[f"qmap{number}"] = table.to(master.device)
        return state

    def keys(self, moment: str) -> tuple[str, ...]:
        """Values of the table, and the magnitude that each is multiplied by."""
        return moment, f"{moment}.absmax"

    def expose(self, state: State, moment: str) -> dict[str, Tensor]:
        # on the host: at 8 bytes a parameter they might not fit where the 8-bit states do
        stored, absmax = state[f"state{NUMBER[moment]}"].cpu(), state.get(f"absmax{NUMBER[moment]}")
        if absmax is None:
            values, magnitudes = stored.clone(), torch.full_like(stored, NO_MAGNITUDE)
        else:
            values = table_of(moment)[stored.long()]
            magnitudes = absmax.cpu().repeat_interleave(BLOCK)[: stored.numel()].view(stored.shape).clone()
        return dict(zip(self.keys(moment), (values, magnitudes), strict=True))

    def absorb(self, state: State, moment: str, exposed: dict[str, Tensor]) -> None:
        values, magnitudes = (exposed[key] for key in self.keys(moment))
        stored = state[f"state{NUMBER[moment]}"]
        if stored.dtype != torch.uint8:
            stored.copy_(values * magnitudes)
            return
        short = -stored.numel() % BLOCK
        values_KB, magnitudes_KB = (F.pad(x.flatten(), (0, short)).view(-1, BLOCK) for x in (values, magnitudes))
        absmax_K = magnitudes_KB.amax(1)
        # one magnitude in all of a block gives exactly 1 here, and so the very index that was saved
        share_KB = magnitudes_KB / absmax_K.masked_fill(absmax_K == 0, 1.0)[:, None]
        index = nearest(values_KB * share_KB, moment).flatten()[: stored.numel()]
        stored.copy_(index.view(stored.shape))
        state[f"absmax{NUMBER[moment]}"].copy_(absmax_K)

    def pack(self, moment: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        values_, magnitudes = (values[key].cpu() for key in self.keys(moment))
        if float(magnitudes.flatten()[0]) == NO_MAGNITUDE:
            return {moment: values_}
        runs, lengths = torch.unique_consecutive(magnitudes, return_counts=True)
        index = nearest(values_, moment)
        return {moment: index, f"{moment}.absmax": runs, f"{moment}.lengths": lengths.to(torch.int32)}

    def unpack(self, moment: str, saved: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        value, runs, lengths = (saved(key) for key in (moment, f"{moment}.absmax", f"{moment}.lengths"))
        if value is None:
            return {}
        if runs is None or lengths is None:  # in fp32: any magnitude of its own is the exact one
            parts = value.sign(), value.abs()
        else:
            parts = table_of(moment)[value.long()], runs.repeat_interleave(lengths).view(value.shape)
        return dict(zip(self.keys(moment), parts, strict=True))


OPTIMIZER = AdamW8bit


def table_of(moment: str) -> Tensor:
    """The 256 values, ascending, that a moment's indices stand for."""
    import_without_compiler(BITSANDBYTES)
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=moment == "exp_avg")


def nearest(values: Tensor, moment: str) -> Tensor:
    """uint8 indices of the table's values that are nearest to ``values``."""
    table = table_of(moment)
    return torch.bucketize(values.contiguous(), (table[1:] + table[:-1]) / 2).to(torch.uint8)
