"""Putting a PEFT adapter on an LLM, with every tensor of it accounted for."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.text.files import ADAPTER_WEIGHTS
from llm2clip_plugin.text.quiet import quiet_adapters

# An adapter trained on the model with its language head names the blocks one level deeper.
WITH_HEAD = re.compile(r"^base_model\.model\.model\.")
BLOCK = re.compile(r"\blayers\.(\d+)\.")


def attach_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False):
    """The LLM wrapped in the adapter of ``folder`` (a ``PeftModel``).

    Raises ContractError if the adapter doesn't fit: a tensor without a place, a place without a tensor, another shape.
    Tensors of blocks that the encoder has dropped (an earlier layer is pooled) are left out.
    """
    quiet_adapters()
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    blocks = len(model.get_submodule("layers"))  # type: ignore[arg-type]
    found = {
        WITH_HEAD.sub("base_model.model.", name): tensor for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items()
    }
    kept = {name: tensor for name, tensor in found.items() if block_of(name) < blocks}
    try:
        wrapped = PeftModel(model, config)
        wanted = get_peft_model_state_dict(wrapped)
    except ValueError as error:
        raise ContractError(f"{folder} does not fit {model.name_or_path}: {error}") from error
    missing, unused = sorted(set(wanted) - set(kept)), sorted(set(kept) - set(wanted))
    wrong = [name for name in kept if name in wanted and kept[name].shape != wanted[name].shape]
    if missing or unused or wrong:
        shapes = [f"{name} {tuple(kept[name].shape)}, expected {tuple(wanted[name].shape)}" for name in wrong]
        raise ContractError(
            f"{folder} is an adapter of another model than {model.name_or_path}: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(unused)} unused {unused[:3]}, {len(wrong)} of another shape {shapes[:3]}"
        )
    set_peft_model_state_dict(wrapped, kept)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(trainable and ".lora_" in name)
    return wrapped


def block_of(name: str) -> int:
    """The number of the transformer block that a tensor belongs to; -1 for none."""
    found = BLOCK.search(name)
    return int(found.group(1)) if found else -1


def cast_adapter(wrapped, dtype: torch.dtype):
    """The same model with the adapter's own weights in ``dtype``: no conversion of activations at every layer."""
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return wrapped


def merge(wrapped) -> PreTrainedModel:
    """The LLM with the adapter added into its weights."""
    with torch.no_grad():
        return wrapped.merge_and_unload()
