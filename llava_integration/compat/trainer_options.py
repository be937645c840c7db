"""LLaVA's scripts pass ``--evaluation_strategy no --warmup_ratio 0.03``; transformers 5 has other names.

``--warmup_ratio r`` is ``--warmup_steps r`` with 0 < r < 1 there, rounded up alike. ``local_rank``, by which LLaVA
decides which rank writes the projector, stays -1 on every rank of ``torchrun`` there. And ``--bf16 True`` is refused
without a GPU, where 4.37 trains.
"""

import dataclasses
import functools
import os
from types import ModuleType
from typing import Any

from llava_integration.compat.completion import Completion


@dataclasses.dataclass
class OldNames:
    """Options of transformers 4.37 that LLaVA's scripts pass."""

    evaluation_strategy: str | None = dataclasses.field(default=None, metadata={"help": "old name of eval_strategy"})
    warmup_ratio: float | None = dataclasses.field(default=None, metadata={"help": "old name of warmup_steps < 1"})


def complete(module: ModuleType) -> None:
    """Add the old names to ``transformers.TrainingArguments``, the dataclass that LLaVA's options extend."""
    import torch
    from transformers import training_args

    original = training_args.TrainingArguments
    initialize = original.__post_init__

    @functools.wraps(initialize)
    def __post_init__(self: Any) -> None:  # noqa: N807 - is set as that method
        translate(self)
        initialize(self)

    # in place: a module of LLaVA may have bound the class already
    for field in dataclasses.fields(OldNames):
        setattr(original, field.name, field.default)
        original.__annotations__[field.name] = OldNames.__annotations__[field.name]
        original.__dataclass_fields__[field.name] = field
    original.__post_init__ = __post_init__
    if not torch.cuda.is_available():
        training_args.is_torch_bf16_gpu_available = lambda: True


def translate(options: Any) -> None:
    """Move the values of old names to the new ones, and set ``local_rank`` as 4.37 does.

    Raises ValueError for a warm-up ratio outside 0 to 1.
    """
    if (ratio := options.warmup_ratio) is not None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"--warmup_ratio {ratio}: expected a fraction of the steps, from 0 to 1")
        if not options.warmup_steps:  # takes precedence in 4.37, too
            options.warmup_steps = min(ratio, 1 - 2**-53)  # 1 would be one step
    if options.evaluation_strategy is not None:
        options.eval_strategy = options.evaluation_strategy
    options.local_rank = int(os.environ.get("LOCAL_RANK", max(0, options.local_rank)))


COMPLETION = Completion(
    module="llava.train.llava_trainer", when="before", libraries={"transformers": ">=5"}, complete=complete
)
