"""LoRA and projector checkpoints, which LLaVA puts onto a base model, and quantization."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

QUANTIZATION = "quantization_config"  # in config.json, and of a model's configuration


def refuse_quantized_base(
    path: str, base: str | None, *, in_8bit: bool, in_4bit: bool
) -> None:
    """Raise ValueError for a base model that is to be loaded in 8 or 4 bits: LLaVA quantizes the
    projector with it, which has no weights yet, and cannot put those of ``path`` there."""
    if base is None or not (in_8bit or in_4bit):
        return
    option = "load_8bit" if in_8bit else "load_4bit"
    raise ValueError(
        f"{option}: LLaVA cannot load {path}, a LoRA or a projector, onto the base model {base} in "
        f"{'8' if in_8bit else '4'} bits; leave it out, or merge both into one checkpoint with "
        "LLaVA's scripts/merge_lora_weights.py and load that"
    )


@contextmanager
def quantized_as_base(builder: dict[str, Any], base: str | None) -> Iterator[None]:
    """Within the block, the configuration that LLaVA's ``builder`` (the names of its module) reads
    says of quantization what the base model's says: a QLoRA training writes its own, but the
    weights that are read are the base's."""
    if base is None:
        yield
        return
    automatic = builder["AutoConfig"]
    read: Callable[..., Any] = automatic.from_pretrained

    class AutoConfig(automatic):
        @classmethod
        def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
            config = read(*arguments, **options)
            if not hasattr(read(base), QUANTIZATION) and hasattr(config, QUANTIZATION):
                delattr(config, QUANTIZATION)
            return config

    builder["AutoConfig"] = AutoConfig
    try:
        yield
    finally:
        builder["AutoConfig"] = automatic
