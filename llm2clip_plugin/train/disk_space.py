"""Whether a run's first checkpoint fits on the disk, computed before the first step."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from llm2clip_plugin.contracts import size_text
from llm2clip_plugin.train.optim import OptimConfig, Trained


def checkpoint_bytes(
    module: nn.Module, trained: Iterable[Trained], optim: OptimConfig, *, averages: int, keep_frozen: bool
) -> int:
    """Size of a checkpoint: fp32 weights, the optimizer's states, and moving averages.

    averages: copies of the weights that follow them (train.ema_decay, a frozen twin). keep_frozen: what is frozen is
    saved, too.
    """
    own = sum(item.parameter.numel() for item in trained)
    states = own * (4 + optim.optimizer().state_bytes + 4 * averages)
    frozen = [p.numel() * 4 for p in module.parameters() if not p.requires_grad]
    return int(states + sum(frozen) * keep_frozen)


def check_space(folder: Path, needed: int, *, fallback: str = "") -> None:
    """Raise OSError if neither ``folder``, which exists, nor the fallback's disk has ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free >= needed or (fallback and shutil.disk_usage(_existing(Path(fallback))).free >= needed):
        return
    raise OSError(
        f"a checkpoint of this run takes {size_text(needed)}, but {folder} has {size_text(free)} free; free space, or "
        "choose an --output on another disk"
    )


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = Path(os.path.abspath(path))
    return path if path.exists() else _existing(path.parent)
