"""LLaVA makes its projector in float32, after ZeRO-3 has partitioned the bf16 language model, and DeepSpeed no longer
casts it: "expected m1 and m2 to have the same dtype", or an AssertionError without a message in ``defragment``.
"""

import functools
from types import ModuleType
from typing import Any

from llava_integration.compat.completion import Completion


def complete(module: ModuleType) -> None:
    """Cast the projector to the language model's dtype under ZeRO-3, as older versions of DeepSpeed did."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    meta = module.LlavaMetaModel
    original = meta.initialize_vision_modules

    @functools.wraps(original)
    def initialize_vision_modules(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        if is_deepspeed_zero3_enabled():
            self.mm_projector.to(self.get_input_embeddings().weight.dtype)

    meta.initialize_vision_modules = initialize_vision_modules


COMPLETION = Completion(
    module="llava.model.llava_arch", when="after", libraries={"deepspeed": ">=0.19.2"}, complete=complete
)
