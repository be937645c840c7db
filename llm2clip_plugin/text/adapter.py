"""LoRA adapters of an LLM: their hash, how they are added, saved, read, stacked and merged."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm2clip_plugin.atomic import atomic_directory
from llm2clip_plugin.contracts import EncoderCard
from llm2clip_plugin.errors import errors_about
from llm2clip_plugin.hashes import canonical_json, sha256_text, sha256_weights
from llm2clip_plugin.quiet import quiet_peft
from llm2clip_plugin.text.config import ALL_LINEAR, LoraSettings
from llm2clip_plugin.vision.directory import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Settings of an adapter that change its output; the rest of its configuration is left out of the
# hash.
ADAPTER_SETTINGS = (
    *("r", "lora_alpha", "use_rslora", "use_dora"),
    *("target_modules", "rank_pattern", "alpha_pattern", "layers_to_transform"),
)
# Of these only the ones that an adapter sets: adapters without them keep their hash.
RARE_ADAPTER_SETTINGS = (
    *(
        "fan_in_fan_out",
        "layers_pattern",
        "exclude_modules",
        "layer_replication",
        "lora_bias",
    ),
    *(
        "alora_invocation_tokens",
        "target_parameters",
        "trainable_token_indices",
        "use_qalora",
    ),
)
# An adapter trained on the model with its language head names the blocks one level deeper.
HEAD_PREFIX = re.compile(r"^base_model\.model\.model\.")
BLOCK = re.compile(r"\blayers\.(\d+)\.")


def adapter_sha256(folder: Path) -> str:
    """SHA-256 over a PEFT adapter: tensors and ``ADAPTER_SETTINGS``. FileNotFoundError for a folder
    without one."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is not a PEFT adapter: {name} is missing; pass its folder or Hub id"
            )
    settings = read_json(folder / ADAPTER_CONFIG)
    relevant = {name: settings.get(name) for name in ADAPTER_SETTINGS}
    relevant |= {
        name: settings[name] for name in RARE_ADAPTER_SETTINGS if settings.get(name)
    }
    if isinstance(relevant["target_modules"], list):
        # PEFT writes a set in random order
        relevant["target_modules"] = sorted(map(str, relevant["target_modules"]))
    weights = sha256_weights(folder / ADAPTER_WEIGHTS)
    return sha256_text(canonical_json([weights, relevant]))


def add_lora(llm: nn.Module, settings: LoraSettings, *, base: str) -> nn.Module:
    """The LLM wrapped in a new LoRA adapter, which alone is trainable. Raises ValueError for
    unknown target names."""
    quiet_peft()
    from peft import LoraConfig, PeftModel

    names: set[str] = set()
    for name, module in llm.named_modules():
        if isinstance(module, nn.Linear):
            names.add(name.rpartition(".")[2])
    linear = sorted(names)
    unknown = [name for name in settings.targets if name not in (ALL_LINEAR, *linear)]
    if unknown:
        raise ValueError(
            f"unknown LoRA targets {unknown}; "
            f"linear layers of this LLM: {', '.join(linear)}, all-linear"
        )
    targets = list(settings.targets)
    if ALL_LINEAR in settings.targets:
        targets = linear
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
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
    """Write a PEFT adapter's folder and card, atomically; ``trained``: parameters by their names in
    ``wrapped``. ``starts``: adapters that were merged into the LLM; the folder's one adapter adds
    what they and ``trained`` add."""
    config = wrapped.peft_config["default"]  # type: ignore[index]
    named = adapter_state(wrapped, trained)
    if starts:
        config, named = stack([*map(read_lora, starts), (config, named)])
    with atomic_directory(directory, replace=replace) as temporary:
        config.save_pretrained(str(temporary))  # type: ignore[union-attr, operator]
        tensors = {name: tensor.contiguous() for name, tensor in named.items()}
        save_file(tensors, str(temporary / ADAPTER_WEIGHTS), metadata={"format": "pt"})
        card.write(temporary / EncoderCard.FILE)


def attach_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False):
    """The LLM wrapped in the adapter saved in ``folder`` (a ``PeftModel``). Raises ContractError if
    a tensor is missing, unexpected or of another shape, but for blocks above the pooled layer,
    which the model has dropped."""
    quiet_peft()
    from peft import PeftModel, set_peft_model_state_dict

    config, tensors = read_adapter(folder)
    config.inference_mode = not trainable
    blocks = len(model.get_submodule("layers"))  # type: ignore[arg-type]
    saved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = BLOCK.search(name)
        if match is None or int(match[1]) < blocks:
            saved[name] = tensor
    with errors_about(f"{folder}, which does not fit {model.name_or_path},"):
        wrapped = PeftModel(model, config)
        expected_shapes = named_shapes(adapter_state(wrapped))
        saved_shapes = named_shapes(saved)
        if expected_shapes != saved_shapes:
            missing = sorted(expected_shapes - saved_shapes)
            unexpected = sorted(saved_shapes - expected_shapes)
            raise ValueError(f"expected {missing[:3]}, it has {unexpected[:3]}")
    set_peft_model_state_dict(wrapped, saved)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(trainable and ".lora_" in name)
    return wrapped


def named_shapes(tensors: dict[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each tensor."""
    return {(name, tuple(tensor.shape)) for name, tensor in tensors.items()}


def adapter_state(
    wrapped: nn.Module, state: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's names; ``state``: parameters by their names in ``wrapped``,
    by default its own.

    Without a word PEFT would look for the LLM's config.json, on the Hub too, to see whether its
    vocabulary has grown.
    """
    from peft import get_peft_model_state_dict

    targets = wrapped.peft_config["default"].target_modules or ()  # type: ignore[index]
    adapts_embeddings = any(name in targets for name in ("embed_tokens", "lm_head"))
    saved = get_peft_model_state_dict(
        wrapped, state_dict=state, save_embedding_layers=adapts_embeddings
    )
    return saved  # type: ignore[return-value]


def read_adapter(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The ``LoraConfig`` and tensors of a saved adapter, named as in an LLM without its language
    head."""
    from peft import LoraConfig

    with errors_about(folder / ADAPTER_CONFIG, fix="copy the adapter again"):
        config = LoraConfig.from_pretrained(str(folder))
    with errors_about(folder / ADAPTER_WEIGHTS, fix="copy the adapter again"):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        renamed[HEAD_PREFIX.sub("base_model.model.", name)] = tensor
    return config, renamed


def read_lora(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """As ``read_adapter``; raises ValueError for an adapter that is more than one rank and scale,
    such as DoRA."""
    config, tensors = read_adapter(folder)
    unsupported = ("use_dora", "rank_pattern", "alpha_pattern")
    special = [name for name in unsupported if getattr(config, name)]
    if special:
        raise ValueError(
            f"start adapter {folder} sets {', '.join(special)}; "
            "merge it into --llm with export-llm first"
        )
    return config, tensors


def merge_adapters(llm: PreTrainedModel, folders: Sequence[Path]) -> PreTrainedModel:
    """The LLM with saved LoRA adapters merged into its weights, in their order."""
    for folder in folders:
        read_lora(folder)
        llm = merge(attach_adapter(llm, folder))
    return llm


def stack(
    adapters: Sequence[tuple[Any, dict[str, Tensor]]],
) -> tuple[Any, dict[str, Tensor]]:
    """One LoRA that adds what all (config, tensors) add together, with the rest of the last one's
    configuration.

    sum_i s_i B_i A_i = [B_1 B_2 ...] [s_1 A_1; s_2 A_2; ...], s_i the scale of adapter i; its own
    scale is 1. A layer that an adapter leaves out has zeros.
    """
    # layer -> tensors of an adapter that has it
    adapter_with: dict[str, dict[str, Tensor]] = {}
    for _, tensors in adapters:
        for name in tensors:
            adapter_with[name.rpartition(".lora_")[0]] = tensors
    stacked: dict[str, Tensor] = {}
    for layer, example in adapter_with.items():
        a_name = f"{layer}.lora_A.weight"
        b_name = f"{layer}.lora_B.weight"
        inputs = example[a_name].shape[1]
        outputs = example[b_name].shape[0]
        a_parts: list[Tensor] = []
        b_parts: list[Tensor] = []
        for config, tensors in adapters:
            scale = config.lora_alpha / (
                config.r**0.5 if config.use_rslora else config.r
            )
            if a_name in tensors and b_name in tensors:
                a_parts.append(scale * tensors[a_name].float())
                b_parts.append(tensors[b_name].float())
            else:
                a_parts.append(torch.zeros(config.r, inputs))
                b_parts.append(torch.zeros(outputs, config.r))
        stacked[a_name] = torch.cat(a_parts, dim=0)
        stacked[b_name] = torch.cat(b_parts, dim=1)
    rank = sum(config.r for config, _ in adapters)
    targets = sorted({layer.rpartition(".")[2] for layer in adapter_with})
    last, _ = adapters[-1]
    config = dataclasses.replace(
        last, r=rank, lora_alpha=rank, use_rslora=False, target_modules=targets
    )
    return config, stacked


def autocast_adapter(wrapped: nn.Module, dtype: torch.dtype) -> torch.dtype | None:
    """Have an fp32 adapter on an LLM in half precision computed in the LLM's ``dtype``: PEFT would
    convert every layer's input to fp32 and keep it. Returns the dtype for
    ``CaptionModel.autocast``; None where products stay as they are: all of one dtype, or DoRA,
    whose norms of weights need fp32."""
    has_fp32_adapter = False
    has_dora = False
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name and parameter.dtype == torch.float32:
            has_fp32_adapter = True
        if "lora_magnitude_vector" in name:
            has_dora = True
    if dtype == torch.float32 or not has_fp32_adapter or has_dora:
        return None
    for module in wrapped.modules():
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    return dtype


def merge(wrapped) -> PreTrainedModel:
    """The LLM with the adapter merged into its weights."""
    with torch.no_grad():
        return wrapped.merge_and_unload()
