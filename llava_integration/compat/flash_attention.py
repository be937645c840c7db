"""``llava.train.train_mem`` asks for FlashAttention 2, which is hard to install with today's torch; where flash-attn is
missing, torch's sdpa attention, which contains the same algorithm, takes its place.
"""

import os
import sys
from types import ModuleType
from typing import Any

from llava_integration.compat.completion import Completion

ASKED, INSTEAD = "flash_attention_2", "sdpa"


def complete(module: ModuleType) -> None:
    """Make ``from_pretrained`` fall back, with one line on the first rank."""
    from transformers import PreTrainedModel
    from transformers.utils import is_flash_attn_2_available

    models: Any = PreTrainedModel
    original = models.from_pretrained.__func__

    def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("attn_implementation") == ASKED and not is_flash_attn_2_available():
            options["attn_implementation"] = INSTEAD
            if os.environ.get("RANK", "0") == "0":
                print(f"llm2clip: flash-attn is not installed; training with {INSTEAD} attention", file=sys.stderr)
        return original(cls, *arguments, **options)

    models.from_pretrained = classmethod(from_pretrained)


COMPLETION = Completion(
    module="llava.train.llava_trainer", when="before", libraries={"transformers": ">=5"}, complete=complete
)
