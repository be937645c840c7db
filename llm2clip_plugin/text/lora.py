"""LoRA on an LLM, and an adapter's folder with the card that says how it embeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from llm2clip_plugin.contracts import EncoderCard, whole_directory
from llm2clip_plugin.text.files import ADAPTER_WEIGHTS
from llm2clip_plugin.text.quiet import quiet_adapters

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The adapter to train."""

    r: int = 16  # rank
    alpha: int = 32  # scale: alpha / r, or alpha / sqrt(r) with rslora
    dropout: float = 0.05  # on the adapter's input
    # names of the layers that get one; all-linear: every linear layer of the blocks
    targets: tuple[str, ...] = (ALL_LINEAR,)
    dora: bool = False  # weight-decomposed LoRA (Liu et al. 2024)
    rslora: bool = False  # rank-stabilised scale (Kalajdzievski 2023)

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"r {self.r} and alpha {self.alpha} must be at least 1, dropout {self.dropout} in [0, 1)")


def add_lora(llm: nn.Module, settings: LoraSettings, *, base: str) -> nn.Module:
    """The LLM wrapped in a new adapter, whose parameters alone train.

    Raises ValueError for target names that the LLM doesn't have, with those that it has.
    """
    quiet_adapters()
    from peft import LoraConfig, PeftModel

    linear = sorted({name.rpartition(".")[2] for name, part in llm.named_modules() if is_linear(part)})
    unknown = [name for name in settings.targets if name != ALL_LINEAR and name not in linear]
    if unknown:
        raise ValueError(
            f"unknown LoRA targets {unknown}; this LLM's linear layers are: {', '.join(linear)}, all-linear"
        )
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=linear if ALL_LINEAR in settings.targets else list(settings.targets),
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        bias="none",
        base_model_name_or_path=base,
    )
    return PeftModel(llm, config)  # type: ignore[arg-type]


def is_linear(part: nn.Module) -> bool:
    """nn.Linear, and bitsandbytes' quantised layers, which derive from it."""
    return isinstance(part, nn.Linear)


def adapter_tensors(wrapped: nn.Module, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trained parameters under the names of PEFT's files; ``trained`` are named as in ``wrapped``."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(wrapped, state_dict=trained)


def save_adapter(
    wrapped: nn.Module, trained: dict[str, Tensor], card: EncoderCard, directory: Path, *, replace: bool = False
) -> None:
    """Write a PEFT adapter's folder with its card, whole."""
    with whole_directory(directory, replace=replace) as aside:
        wrapped.peft_config["default"].save_pretrained(str(aside))  # type: ignore[index, union-attr, operator]
        tensors = {name: tensor.contiguous() for name, tensor in adapter_tensors(wrapped, trained).items()}
        save_file(tensors, str(aside / ADAPTER_WEIGHTS), metadata={"format": "pt"})
        card.write(aside / EncoderCard.FILE)
