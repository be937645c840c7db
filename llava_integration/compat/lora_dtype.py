"""peft makes LoRA weights of a bf16 model in float32 since 0.12. LLaVA's are bf16, and ZeRO-3 takes one dtype alone."""

import functools
from types import ModuleType
from typing import Any

from llava_integration.compat.completion import Completion


def complete(module: ModuleType) -> None:
    """Make ``get_peft_model``, which LLaVA's ``train`` imports when it runs, keep the dtype of the base model."""
    import peft

    original = peft.get_peft_model

    @functools.wraps(original)
    def get_peft_model(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **{"autocast_adapter_dtype": False, **options})

    peft.get_peft_model = get_peft_model


COMPLETION = Completion(
    module="llava.train.llava_trainer", when="before", libraries={"peft": ">=0.12"}, complete=complete
)
