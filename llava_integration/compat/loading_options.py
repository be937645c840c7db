"""Options of ``from_pretrained`` whose meaning changed in transformers 5, as LLaVA passes them.

- ``torch_dtype=None`` (LLaVA trains in fp16 or fp32) meant float32; it now means the dtype of the file, which for
  Vicuna is float16: its weights could not be trained with a loss scale, and lose their small updates.
- ``load_in_8bit`` and ``load_in_4bit`` are gone: only ``quantization_config`` says so. Weights that are not quantized
  were loaded in float16.
"""

from types import ModuleType
from typing import Any

from llava_integration.compat.completion import Completion


def complete(module: ModuleType) -> None:
    """Translate the options of every model that LLaVA loads; calls without them are not changed."""
    from transformers import PreTrainedModel

    models: Any = PreTrainedModel
    original = models.from_pretrained.__func__

    def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
        return original(cls, *arguments, **of_today(options))

    models.from_pretrained = classmethod(from_pretrained)


def of_today(options: dict[str, Any]) -> dict[str, Any]:
    """The options as transformers 5 takes them."""
    import torch
    from transformers import BitsAndBytesConfig

    options = dict(options)
    bits = {name: options.pop(name) for name in ("load_in_8bit", "load_in_4bit") if name in options}
    if any(bits.values()) and options.get("quantization_config") is None:
        options["quantization_config"] = BitsAndBytesConfig(**bits)
    says_dtype = options.get("torch_dtype") is not None or options.get("dtype") is not None
    if not says_dtype and any(bits.values()):
        options["torch_dtype"] = torch.float16
    elif not says_dtype and "torch_dtype" in options:
        options["torch_dtype"] = torch.float32
    if "torch_dtype" in options:
        options["dtype"] = options.pop("torch_dtype")
    return options


COMPLETION = Completion(
    module="llava.model.language_model.llava_llama",  # the first of LLaVA's modules that every program imports
    when="before",
    libraries={"transformers": ">=5"},
    complete=complete,
)
