"""A LLaVA 1.5 checkpoint on disk, full, LoRA or projector alone: what it is, and its tensors under LLaVA's names."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_integration.serve import lora
from llava_integration.serve.tensors import FIX, LazyTensor, LazyTensors, open_file, open_tensors
from llava_integration.towers.checkpoint_files import checkpoint_config
from llm2clip_plugin.commands import command
from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.directory import read_json

CONFIG, PROJECTOR, ADAPTER = "config.json", "mm_projector.bin", "adapter_config.json"
NON_LORA = "non_lora_trainables.bin"
LLAVA_TYPES = ("llava_llama", "llava")  # of LLaVA 1.5; "llava" before its releases of November 2023
PROJECTOR_TYPE = "mlp2x_gelu"


@dataclass(frozen=True, kw_only=True)
class LlavaCheckpoint:
    """A checkpoint that this package can export."""

    directory: Path
    kind: str  # full | lora | projector
    config: dict[str, Any]
    base: Path | None  # of a LoRA or projector checkpoint

    @property
    def language_model(self) -> Path:
        """The folder with the language model's weights and its tokenizer, as LLaVA reads them."""
        return self.base or self.directory


def open_checkpoint(directory: Path, base: Path | None = None) -> LlavaCheckpoint:
    """Read what kind of checkpoint a folder has.

    Raises FileNotFoundError or ContractError if it is not a checkpoint of LLaVA 1.5, needs a base model, or has what
    Hugging Face's LLaVA cannot express.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a folder; download a checkpoint of the Hub first")
    config = checkpoint_config(directory)
    refuse_unsupported(config, directory / CONFIG)
    weights = ("model*.safetensors", "pytorch_model*.bin", "*.index.json")
    if (directory / ADAPTER).is_file():
        kind = "lora"
    elif (directory / PROJECTOR).is_file() and not any(any(directory.glob(pattern)) for pattern in weights):
        kind = "projector"
    else:
        kind = "full"
    if kind == "full" and base is not None:
        raise ValueError(f"{directory} is a full checkpoint; leave out --model-base {base}")
    found = None if kind == "full" else _base(directory, kind, config, base)
    return LlavaCheckpoint(directory=directory, kind=kind, config=config, base=found)


def refuse_unsupported(config: dict[str, Any], where: Path) -> None:
    """Raise ContractError, naming the setting, unless Hugging Face's LLaVA computes what LLaVA computes with it."""
    if "vision_config" in config:
        raise ContractError(f"{where}: this is a Hugging Face model already, which servers open as it is")
    kind = config.get("model_type")
    if kind not in LLAVA_TYPES or "mm_vision_tower" not in config:
        raise ContractError(
            f"{where}: model_type is {kind!r}"
            f"{'' if 'mm_vision_tower' in config else ' and there is no mm_vision_tower'}; expected a checkpoint of "
            "LLaVA 1.5 (llava_llama)"
        )
    if (projector := config.get("mm_projector_type", "linear")) != PROJECTOR_TYPE:
        raise ContractError(f"{where}: mm_projector_type is {projector!r}, Hugging Face's LLaVA has {PROJECTOR_TYPE}")
    loaded = {"mm_use_im_patch_token": True, **config}  # what LLaVA's loader takes for granted
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token", "s2"):
        if loaded.get(name):
            raise ContractError(f"{where}: {name} is set, which Hugging Face's LLaVA cannot express")
    if quantized := config.get("quantization_config"):
        kind = quantized.get("quant_method", "") if isinstance(quantized, dict) else quantized
        raise ContractError(f"{where}: the checkpoint is quantized ({kind}); use the one that it was made from")
    if (aspect := config.get("image_aspect_ratio")) == "anyres" or config.get("mm_patch_merge_type", "flat") != "flat":
        raise ContractError(f"{where}: image_aspect_ratio is {aspect!r}: that is LLaVA-NeXT, not LLaVA 1.5")


def _base(directory: Path, kind: str, config: dict[str, Any], given: Path | None) -> Path:
    """The base model's folder: the one given, or else the recorded one if it exists."""
    recorded = str(config.get("_name_or_path", ""))
    if kind == "lora":
        recorded = str(read_json(directory / ADAPTER).get("base_model_name_or_path") or recorded)
    base = Path(recorded) if given is None else given
    if base.is_dir():
        return base
    example = command("llava", "export", directory, "--model-base", "DIR", "--format", "hf", "--output", "OUT")
    raise FileNotFoundError(
        f"{directory} is a {kind} checkpoint, which needs its base model, and {str(base)!r} is not a folder; "
        f"run `{example}`"
    )


def checkpoint_tensors(checkpoint: LlavaCheckpoint, files: ExitStack) -> LazyTensors:
    """Every tensor under the names of a full checkpoint; LoRA weights are merged when a tensor is read."""
    tensors = open_tensors(checkpoint.language_model, files)
    if checkpoint.kind == "full":
        return tensors
    tensors = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}
    if checkpoint.kind == "projector":
        return tensors | open_file(checkpoint.directory / PROJECTOR, files)
    return lora.merged(tensors | _trained_beside_lora(checkpoint.directory, files), checkpoint.directory, files)


def _trained_beside_lora(directory: Path, files: ExitStack) -> LazyTensors:
    """The tensors of non_lora_trainables.bin, which peft's wrapper has given a prefix."""
    path = directory / NON_LORA
    if not path.is_file():
        raise FileNotFoundError(f"no {NON_LORA} in {directory}, where LLaVA writes the projector of a LoRA; {FIX}")
    found: dict[str, LazyTensor] = {}
    for name, tensor in open_file(path, files).items():
        short = name.removeprefix("base_model.")
        found[short.removeprefix("model.") if short.startswith("model.model.") else short] = tensor
    return found
