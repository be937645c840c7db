"""A LLaVA 1.5 checkpoint on disk, full, LoRA or projector alone: what it is, and its tensors under LLaVA's names."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llava_integration.checkpoints import checkpoint_config
from llava_integration.compat.runner import adapters_stay_fp32
from llm2clip_plugin.files import ContractError, errors_about, read_header
from llm2clip_plugin.vision.directory import read_json, read_tensors, weight_files

# Tensors of checkpoints are read one by one when they are needed, and written in shards: a model of any size passes
# through the memory of one shard.

SHARD_BYTES = 2 << 30
INDEX = "model.safetensors.index.json"
FIX = "copy the checkpoint again"


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor that is read from its file when ``read`` is called."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    where: str  # the file, for messages


LazyTensors = dict[str, LazyTensor]


def in_memory(tensors: dict[str, Tensor], where: object) -> LazyTensors:
    """Tensors that are in memory already."""
    return {n: LazyTensor(shape=tuple(t.shape), read=lambda t=t: t, where=str(where)) for n, t in tensors.items()}


def open_tensors(directory: Path, files: ExitStack) -> LazyTensors:
    """Every tensor of a folder's checkpoint: .safetensors or .bin, one file or the shards of an index.

    ``files`` keeps the files open. Raises FileNotFoundError for a missing file, ContractError for an incomplete one.
    """
    tensors: LazyTensors = {}
    for path in weight_files(directory):
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name} in {directory}, which its index lists; {FIX}")
        tensors |= open_file(path, files)
    return tensors


def open_file(path: Path, files: ExitStack) -> LazyTensors:
    """The tensors of one file. Raises ContractError if it is not complete."""
    if path.suffix != ".safetensors":
        return in_memory(read_tensors(path), path)
    header = read_header(path, fix=FIX)
    with errors_about(path, fix=FIX):
        handle: Any = files.enter_context(safe_open(path, framework="pt"))
    return {
        name: LazyTensor(shape=entry.shape, read=lambda name=name: handle.get_tensor(name), where=str(path))
        for name, entry in header.entries.items()
    }


def write_shards(tensors: LazyTensors, directory: Path, dtype: torch.dtype | None) -> int:
    """Write ``tensors`` as safetensors shards with their index, and compare each with what was written; their bytes.

    ``dtype`` None keeps each tensor's own. Raises ContractError for a value that ``dtype`` cannot hold, or a shard that
    reads back differently.
    """
    from safetensors.torch import save_file

    shards = list(_shards(tensors, dtype))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        state = {name: _converted(name, tensors[name], dtype) for name in names}
        save_file(state, directory / file, metadata={"format": "pt"})
        with safe_open(directory / file, framework="pt") as written:
            for name, tensor in state.items():
                if not torch.equal(written.get_tensor(name), tensor):  # pyright: ignore[reportAttributeAccessIssue]
                    raise ContractError(f"{directory / file}: {name} differs after reloading; check the disk and rerun")
        weight_map |= dict.fromkeys(state, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if len(shards) > 1:
        body = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return total


def _shards(tensors: LazyTensors, dtype: torch.dtype | None) -> Iterator[list[str]]:
    """Names in order, as many as fit into a shard."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        more = torch.Size(tensor.shape).numel() * (dtype or torch.float32).itemsize
        if names and size + more > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _converted(name: str, tensor: LazyTensor, dtype: torch.dtype | None) -> Tensor:
    with errors_about(tensor.where, fix=FIX):
        value = tensor.read()
    if value.itemsize == 1:
        raise ContractError(f"{tensor.where}: {name} has dtype {value.dtype}; quantized checkpoints are not read")
    # contiguous and of its own memory: safetensors refuses tensors that share it
    out = value.to((value.is_floating_point() and dtype) or value.dtype, copy=True).contiguous()
    if not torch.isfinite(out).all():
        is_large = bool(torch.isfinite(value).all())
        reason = "has values that fp16 cannot hold; pass --dtype bf16" if is_large else f"is nan; {FIX}"
        raise ContractError(f"{tensor.where}: {name} {reason}")
    return out


def refuse_rest(names: Iterable[str], where: object) -> None:
    """Raise ContractError for tensors that nothing knows, by name."""
    if rest := sorted(names):
        more = f" and {len(rest) - 5} more" if len(rest) > 5 else ""
        raise ContractError(f"{where}: unknown tensors {', '.join(rest[:5])}{more}; this is not a LLaVA 1.5 checkpoint")


# LoRA weights merged into the tensors that they belong to, when these are read.

LORA_FILE, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight$")
# settings of peft under which a merge is another sum, or more than one scale; LLaVA's training does not set them
OTHER_SUMS = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")


def merged(tensors: LazyTensors, directory: Path, files: ExitStack) -> LazyTensors:
    """``tensors`` with the adapter of ``directory`` merged into them, in fp16, as by LLaVA's loader with this
    environment's peft. Raises ContractError for an adapter of another kind, a half that is missing, or a module that
    the model doesn't have."""
    config = read_json(directory / LORA_FILE)
    scale = _scale(config, directory / LORA_FILE)
    path = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no {' or '.join(WEIGHTS)} in {directory}; {FIX}")
    halves: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in open_file(path, files).items():
        match = NAME.match(name)
        target = f"{match['module']}.weight" if match else name
        if match is None or target not in tensors:
            raise ContractError(f"{path}: {name} belongs to no weight of the base model; check --model-base")
        halves.setdefault(target, {})[match["half"]] = tensor
    targets = config.get("target_modules")
    kinds = {str(target).split(".")[-1] for target in targets} if isinstance(targets, list) else set()
    blocks = {name for name in tensors if name.startswith("model.layers.") and name.endswith(".weight")}
    wanted = {name for name in blocks if name.split(".")[-2] in kinds}
    if lost := sorted(wanted - {*halves}):
        raise ContractError(f"{path}: {len(lost)} of {len(wanted)} target_modules have no LoRA, as {lost[0]}; {FIX}")
    out = dict(tensors)
    for name, pair in halves.items():
        if len(pair) != 2:
            raise ContractError(f"{path}: {name} has one half of its LoRA, expected lora_A and lora_B; {FIX}")
        shape, rank = (pair["B"].shape[0], pair["A"].shape[-1]), pair["A"].shape[0]
        if (shape, rank) != (expected := (tensors[name].shape, config["r"])):
            told = f"has shape {shape}, rank {rank}, expected {expected[0]}, {expected[1]}"
            raise ContractError(f"{path}: the LoRA of {name} {told}; check --model-base")
        out[name] = LazyTensor(
            shape=shape,
            read=lambda weight=tensors[name], pair=pair: _sum(weight.read(), pair["A"].read(), pair["B"].read(), scale),
            where=str(path),
        )
    return out


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    if adapters_stay_fp32():
        return weight.half().add_((b.float() @ a.float()) * scale)
    delta = (b.half().float() @ a.half().float()) * scale
    return weight.half() + delta.half()


def _scale(config: dict[str, Any], where: Path) -> float:
    if config.get("peft_type") != "LORA":
        raise ContractError(f"{where} is not a LoRA's configuration; {FIX}")
    others = {name: config[name] for name in OTHER_SUMS if config.get(name)}
    if config.get("bias", "none") != "none":
        others["bias"] = config["bias"]
    if others:
        raise ContractError(f"{where}: {others} are settings of another LoRA than LLaVA's training makes")
    with errors_about(where, fix=FIX):
        rank, alpha = config["r"], config["lora_alpha"]
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)


CONFIG, PROJECTOR, ADAPTER = "config.json", "mm_projector.bin", "adapter_config.json"
NON_LORA = "non_lora_trainables.bin"
LLAVA_TYPES = ("llava_llama", "llava")  # of LLaVA 1.5; "llava" before its releases of November 2023
EXPRESSIBLE: dict[str, tuple[Any, ...]] = {  # what LLaVA and Hugging Face's LLaVA both compute
    "mm_projector_type": ("mlp2x_gelu",),
    **dict.fromkeys(("mm_use_im_start_end", "mm_use_im_patch_token", "s2"), (False, None)),
    "quantization_config": (None,),
    "image_aspect_ratio": ("square", "pad", None),
    "mm_patch_merge_type": ("flat",),
}
LANGUAGE_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")  # a Llama's


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
    """What a folder has; FileNotFoundError or ContractError if it is no LLaVA 1.5 that Hugging Face's can express."""
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
    if kind != "full" and base is None:  # the one recorded
        recorded = read_json(directory / ADAPTER).get("base_model_name_or_path") if kind == "lora" else ""
        base = Path(str(recorded or config.get("_name_or_path", "")))
    if base is not None and not base.is_dir():
        told = f"{directory} is a {kind} checkpoint, which needs its base model, and {str(base)!r} is not a folder"
        raise FileNotFoundError(f"{told}; pass it as --model-base DIR")
    return LlavaCheckpoint(directory=directory, kind=kind, config=config, base=base)


def refuse_unsupported(config: dict[str, Any], where: Path) -> None:
    """Raise ContractError, naming the setting, unless Hugging Face's LLaVA computes what LLaVA computes with it."""
    if "vision_config" in config:
        raise ContractError(f"{where}: this is a Hugging Face model already, which servers open as it is")
    kind, tower = config.get("model_type"), config.get("mm_vision_tower")
    if kind not in LLAVA_TYPES or not tower:
        raise ContractError(f"{where}: model_type is {kind!r}, mm_vision_tower {tower!r}; expected LLaVA 1.5 models")
    loaded = {"mm_projector_type": "linear", "mm_use_im_patch_token": True, "mm_patch_merge_type": "flat", **config}
    for name, values in EXPRESSIBLE.items():
        if loaded.get(name) not in values:
            allowed = " or ".join(map(repr, values))
            raise ContractError(f"{where}: {name} is {loaded[name]!r}; Hugging Face's LLaVA 1.5 has {allowed}")
    for name in LANGUAGE_SIZES:
        if type(config.get(name)) is not int or config[name] < 1:
            raise ContractError(f"{where}: {name} is {config.get(name)!r}, expected a positive whole number; {FIX}")


def checkpoint_tensors(checkpoint: LlavaCheckpoint, files: ExitStack) -> LazyTensors:
    """Every tensor under the names of a full checkpoint; LoRA weights are merged when a tensor is read."""
    tensors = open_tensors(checkpoint.language_model, files)
    if checkpoint.kind == "full":
        return tensors
    tensors = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}
    if checkpoint.kind == "projector":
        return tensors | open_file(checkpoint.directory / PROJECTOR, files)
    beside = checkpoint.directory / NON_LORA  # where LLaVA writes the projector of a LoRA
    if not beside.is_file():
        raise FileNotFoundError(f"no {NON_LORA} in {checkpoint.directory}; {FIX}")
    for name, tensor in open_file(beside, files).items():
        short = name.removeprefix("base_model.")  # of peft's wrapper
        tensors[short.removeprefix("model.") if short.startswith("model.model.") else short] = tensor
    return merged(tensors, checkpoint.directory, files)
