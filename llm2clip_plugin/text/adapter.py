"""PEFT adapters on an LLM: a new LoRA to train, a saved one attached or merged, and the folder that holds one."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm2clip_plugin.console import quiet_peft
from llm2clip_plugin.contracts import (
    EncoderCard,
    atomic_directory,
    canonical_json,
    files_sha256,
    sha256_text,
    sha256_weights,
)
from llm2clip_plugin.files import errors_about
from llm2clip_plugin.text.config import ALL_LINEAR, LoraSettings
from llm2clip_plugin.vision.directory import fetch_directory, read_json

TOKENIZER_FILES = ("*.model", "*.txt", "*.jinja")
WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Settings of an adapter that change its output; the rest of its configuration is left out of the hash.
ADAPTER_SETTINGS = (
    *("r", "lora_alpha", "use_rslora", "use_dora"),
    *("target_modules", "rank_pattern", "alpha_pattern", "layers_to_transform"),
)
# An adapter trained on the model with its language head names the blocks one level deeper.
HEAD_PREFIX = re.compile(r"^base_model\.model\.model\.")
BLOCK = re.compile(r"\blayers\.(\d+)\.")


def local_folder(llm: str, revision: str = "") -> Path:
    """The folder of an LLM: ``llm`` itself, or its snapshot from the Hub, downloaded unless it is cached.
    Raises ValueError for an empty ``llm``, FileNotFoundError if neither a folder nor the Hub has it."""
    if not llm:
        raise ValueError("no LLM given; set --llm PATH_OR_HUB_ID")
    folder = fetch_directory(llm, revision=revision or None, also=TOKENIZER_FILES)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{llm} has no config.json; expected a Hugging Face model folder")
    return folder


def weights_sha256(folder: Path) -> str:
    """SHA-256 over a model folder's weights; raises FileNotFoundError if there are none."""
    paths = next(filter(None, (sorted(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS)), None)
    if paths is None:
        raise FileNotFoundError(f"{folder} has no weights (no {' or '.join(WEIGHT_PATTERNS)})")
    return files_sha256(paths)


def adapter_sha256(folder: Path) -> str:
    """SHA-256 over a PEFT adapter: tensors and ``ADAPTER_SETTINGS``. FileNotFoundError for a folder without one."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a PEFT adapter: {name} is missing; pass its folder or Hub id")
    settings = read_json(folder / ADAPTER_CONFIG)
    relevant = {name: settings.get(name) for name in ADAPTER_SETTINGS}
    if isinstance(relevant["target_modules"], list):
        relevant["target_modules"] = sorted(map(str, relevant["target_modules"]))  # PEFT writes a set in random order
    weights = sha256_weights(folder / ADAPTER_WEIGHTS)
    return sha256_text(canonical_json([weights, relevant]))


def add_lora(llm: nn.Module, settings: LoraSettings, *, base: str) -> nn.Module:
    """The LLM wrapped in a new LoRA adapter, which alone is trainable. Raises ValueError for unknown target names."""
    quiet_peft()
    from peft import LoraConfig, PeftModel

    linear = sorted({name.rpartition(".")[2] for name, module in llm.named_modules() if isinstance(module, nn.Linear)})
    if unknown := [name for name in settings.targets if name not in (ALL_LINEAR, *linear)]:
        raise ValueError(f"unknown LoRA targets {unknown}; linear layers of this LLM: {', '.join(linear)}, all-linear")
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


def save_adapter(
    wrapped: nn.Module,
    trained: dict[str, Tensor],
    card: EncoderCard,
    directory: Path,
    *,
    starts: Sequence[Path] = (),
    replace: bool = False,
) -> None:
    """Write a PEFT adapter's folder and card, atomically; ``trained``: parameters by their names in ``wrapped``.
    ``starts``: adapters that were merged into the LLM; the folder's one adapter adds what they and ``trained`` add."""
    from peft import get_peft_model_state_dict

    config = wrapped.peft_config["default"]  # type: ignore[index]
    named = get_peft_model_state_dict(wrapped, state_dict=trained)
    if starts:
        config, named = stack([*map(read_lora, starts), (config, named)])
    with atomic_directory(directory, replace=replace) as temporary:
        config.save_pretrained(str(temporary))  # type: ignore[union-attr, operator]
        tensors = {name: tensor.contiguous() for name, tensor in named.items()}
        save_file(tensors, str(temporary / ADAPTER_WEIGHTS), metadata={"format": "pt"})
        card.write(temporary / EncoderCard.FILE)


def attach_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False):
    """The LLM wrapped in the adapter saved in ``folder`` (a ``PeftModel``). Raises ContractError if a tensor is
    missing, unexpected or of another shape, but for blocks above the pooled layer, which the model has dropped."""
    quiet_peft()
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    config, tensors = read_adapter(folder)
    config.inference_mode = not trainable
    blocks = len(model.get_submodule("layers"))  # type: ignore[arg-type]
    block_of = {name: int(match[1]) for name in tensors if (match := BLOCK.search(name))}
    saved = {name: tensor for name, tensor in tensors.items() if block_of.get(name, -1) < blocks}
    with errors_about(f"{folder}, which does not fit {model.name_or_path},"):
        wrapped = PeftModel(model, config)
        expected = get_peft_model_state_dict(wrapped)
        ours, theirs = ({(name, tuple(x.shape)) for name, x in each.items()} for each in (expected, saved))
        if ours != theirs:
            raise ValueError(f"expected {sorted(ours - theirs)[:3]}, it has {sorted(theirs - ours)[:3]}")
    set_peft_model_state_dict(wrapped, saved)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(trainable and ".lora_" in name)
    return wrapped


def read_adapter(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The ``LoraConfig`` and tensors of a saved adapter, named as in an LLM without its language head."""
    from peft import LoraConfig

    with errors_about(folder / ADAPTER_CONFIG, fix="copy the adapter again"):
        config = LoraConfig.from_pretrained(str(folder))
    with errors_about(folder / ADAPTER_WEIGHTS, fix="copy the adapter again"):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    return config, {HEAD_PREFIX.sub("base_model.model.", name): tensor for name, tensor in tensors.items()}


def read_lora(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """As ``read_adapter``; raises ValueError for an adapter that is more than one rank and scale, such as DoRA."""
    config, tensors = read_adapter(folder)
    if special := [name for name in ("use_dora", "rank_pattern", "alpha_pattern") if getattr(config, name)]:
        raise ValueError(f"start adapter {folder} sets {', '.join(special)}; merge it into --llm with export-llm first")
    return config, tensors


def merge_adapters(llm: PreTrainedModel, folders: Sequence[Path]) -> PreTrainedModel:
    """The LLM with saved LoRA adapters merged into its weights, in their order."""
    for folder in folders:
        read_lora(folder)
        llm = merge(attach_adapter(llm, folder))
    return llm


def stack(adapters: Sequence[tuple[Any, dict[str, Tensor]]]) -> tuple[Any, dict[str, Tensor]]:
    """One LoRA that adds what all (config, tensors) add together, with the rest of the last one's configuration.

    sum_i s_i B_i A_i = [B_1 B_2 ...] [s_1 A_1; s_2 A_2; ...], s_i the scale of adapter i; its own scale is 1. A layer
    that an adapter leaves out has zeros.
    """
    layers = {name.rpartition(".lora_")[0]: (name, tensors) for _, tensors in adapters for name in tensors}
    stacked: dict[str, Tensor] = {}
    for layer, (_, known) in layers.items():
        for side in "AB":
            name = f"{layer}.lora_{side}.weight"
            parts = []
            for config, tensors in adapters:
                scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
                shape = (config.r, known[name].shape[1]) if side == "A" else (known[name].shape[0], config.r)
                part = tensors[name].float() if name in tensors else torch.zeros(shape)
                parts.append(scale * part if side == "A" else part)
            stacked[name] = torch.cat(parts, 0 if side == "A" else 1)
    rank = sum(config.r for config, _ in adapters)
    targets = sorted({layer.rpartition(".")[2] for layer in layers})
    last = adapters[-1][0]
    return dataclasses.replace(last, r=rank, lora_alpha=rank, use_rslora=False, target_modules=targets), stacked


def autocast_adapter(wrapped: nn.Module, dtype: torch.dtype) -> torch.dtype | None:
    """Have an fp32 adapter on an LLM in half precision computed in the LLM's ``dtype``: PEFT would convert every
    layer's input to fp32 and keep it. Returns the dtype for ``CaptionModel.autocast``; None where products stay as they
    are: all of one dtype, or DoRA, whose norms of weights need fp32."""
    names = dict(wrapped.named_parameters())
    fp32 = any(".lora_" in name and parameter.dtype == torch.float32 for name, parameter in names.items())
    if dtype == torch.float32 or not fp32 or any("lora_magnitude_vector" in name for name in names):
        return None
    for module in wrapped.modules():
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    return dtype


def merge(wrapped) -> PreTrainedModel:
    """The LLM with the adapter merged into its weights."""
    with torch.no_grad():
        return wrapped.merge_and_unload()
