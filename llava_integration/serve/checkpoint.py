"""A LLaVA 1.5 checkpoint on disk, full or LoRA: what it is, and its tensors under LLaVA's names.

Tensors are read one by one when they are needed, and written in shards: a model of any size passes
through the memory of one shard.
"""

import math
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llava_integration.plug.checkpoints import checkpoint_config
from llava_integration.plug.compat.runner import adapters_stay_fp32
from llava_integration.plug.resumed_data import refuse_other_base
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.safetensors_header import read_header
from llm2clip_plugin.vision.directory import (
    read_json,
    read_tensors,
    weight_files,
    write_json,
)

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
    lazy_tensors = {}
    for name, tensor in tensors.items():
        lazy_tensors[name] = LazyTensor(
            shape=tuple(tensor.shape),
            read=lambda tensor=tensor: tensor,
            where=str(where),
        )
    return lazy_tensors


def open_tensors(paths: Iterable[Path], files: ExitStack) -> LazyTensors:
    """The tensors of .safetensors and .bin files, which ``files`` keeps open.

    Raises FileNotFoundError for a missing file, ContractError for an incomplete one.
    """
    tensors: LazyTensors = {}
    for path in paths:
        if path.suffix != ".safetensors":
            tensors |= in_memory(read_tensors(path), path)
            continue
        entries = read_header(path, fix=FIX).entries
        handle: Any = files.enter_context(safe_open(path, framework="pt"))
        for name, entry in entries.items():
            read = partial(handle.get_tensor, name)
            tensors[name] = LazyTensor(shape=entry.shape, read=read, where=str(path))
    return tensors


def write_shards(tensors: LazyTensors, directory: Path, dtype: torch.dtype) -> int:
    """Write ``tensors`` as safetensors shards with their index, and compare each with what was
    written; their bytes.

    Raises ContractError for a value that ``dtype`` cannot hold, or a shard that reads back
    differently.
    """
    shards = shards_of(tensors, dtype.itemsize)
    total = 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        position = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = directory / f"model{position}.safetensors"
        state = {name: converted(name, tensors[name], dtype) for name in names}
        save_file(state, path, metadata={"format": "pt"})
        with safe_open(path, framework="pt") as written:
            for name, tensor in state.items():
                if not torch.equal(written.get_tensor(name), tensor):  # pyright: ignore[reportAttributeAccessIssue]
                    raise ContractError(
                        f"{path}: {name} differs after reloading; check the disk and rerun"
                    )
        weight_map |= dict.fromkeys(state, path.name)
        total += sum(tensor.nbytes for tensor in state.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / INDEX, index)
    return total


def shards_of(tensors: LazyTensors, itemsize: int) -> list[list[str]]:
    """The names of each shard's tensors, in order; ``itemsize``: bytes of a number."""
    shards: list[list[str]] = [[]]
    size = 0  # of the last shard
    for name, tensor in tensors.items():
        more = math.prod(tensor.shape) * itemsize
        if shards[-1] and size + more > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards


def converted(name: str, tensor: LazyTensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``, if it is one of floating-point numbers."""
    with errors_about(tensor.where, fix=FIX):
        value = tensor.read()
    if value.itemsize == 1:
        raise ContractError(
            f"{tensor.where}: {name} has dtype {value.dtype}; quantized checkpoints are not read"
        )
    if not value.is_floating_point():
        dtype = value.dtype
    # contiguous and of its own memory: safetensors refuses tensors that share it
    written = value.to(dtype, copy=True).contiguous()
    if not torch.isfinite(written).all():
        reason = f"is nan; {FIX}"
        if torch.isfinite(value).all():
            reason = "has values that fp16 cannot hold; pass --dtype bf16"
        raise ContractError(f"{tensor.where}: {name} {reason}")
    return written


def refuse_rest(names: Iterable[str], where: object) -> None:
    """Raise ContractError for tensors that nothing knows, by name."""
    if rest := sorted(names):
        problem = f"{len(rest)} unknown tensors such as {rest[0]}"
        raise ContractError(f"{where}: {problem}; this is not a LLaVA 1.5 checkpoint")


CONFIG = "config.json"
ADAPTER = "adapter_config.json"
NON_LORA = "non_lora_trainables.bin"
# of LLaVA 1.5; "llava" before its releases of November 2023
LLAVA_TYPES = ("llava_llama", "llava")
# what LLaVA and Hugging Face's LLaVA both compute
EXPRESSIBLE: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
    "s2": (False, None),
    "quantization_config": (None,),
    "image_aspect_ratio": ("square", "pad", None),
    "mm_patch_merge_type": ("flat",),
}


@dataclass(frozen=True, kw_only=True)
class LlavaCheckpoint:
    """A checkpoint that this package can export."""

    directory: Path
    config: dict[str, Any]
    base: Path | None  # of a LoRA

    @property
    def language_model(self) -> Path:
        """The folder with the language model's weights and its tokenizer, as LLaVA reads them."""
        return self.base or self.directory


def open_checkpoint(directory: Path, base: Path | None = None) -> LlavaCheckpoint:
    """What a folder has; FileNotFoundError or ContractError if it is no LLaVA 1.5 that Hugging
    Face's can express."""
    config = checkpoint_config(directory)
    is_lora = (directory / ADAPTER).is_file()
    if is_lora:
        config.pop("quantization_config", None)  # of QLoRA; its base is read as it is
    refuse_unsupported(config, directory / CONFIG)
    if base is not None and not is_lora:
        raise ValueError(
            f"{directory} is a full checkpoint; leave out --model-base {base}"
        )
    if base is None and is_lora:  # the one recorded
        recorded = read_json(directory / ADAPTER).get("base_model_name_or_path")
        base = Path(str(recorded or config.get("_name_or_path", "")))
    if base is not None and not base.is_dir():
        raise FileNotFoundError(
            f"{directory} is a LoRA checkpoint, which needs its base model, "
            f"and {str(base)!r} is not a folder; pass it as --model-base DIR"
        )
    if base is not None:
        refuse_other_base(config, base, directory)
    return LlavaCheckpoint(directory=directory, config=config, base=base)


def refuse_unsupported(config: dict[str, Any], where: Path) -> None:
    """Raise ContractError, naming the setting, unless Hugging Face's LLaVA computes what LLaVA
    computes with it."""
    if "vision_config" in config:
        raise ContractError(
            f"{where}: this is a Hugging Face model already, which servers open as it is"
        )
    kind = config.get("model_type")
    tower = config.get("mm_vision_tower")
    if kind not in LLAVA_TYPES or not tower:
        raise ContractError(
            f"{where}: model_type is {kind!r}, mm_vision_tower {tower!r}; expected LLaVA 1.5 models"
        )
    loaded = {
        "mm_projector_type": "linear",
        "mm_use_im_patch_token": True,
        "mm_patch_merge_type": "flat",
        **config,
    }
    for name, values in EXPRESSIBLE.items():
        if loaded.get(name) not in values:
            allowed = " or ".join(map(repr, values))
            raise ContractError(
                f"{where}: {name} is {loaded[name]!r}; Hugging Face's LLaVA 1.5 has {allowed}"
            )


def checkpoint_tensors(checkpoint: LlavaCheckpoint, files: ExitStack) -> LazyTensors:
    """Every tensor under the names of a full checkpoint; LoRA weights are merged when a tensor is
    read."""
    tensors = open_tensors(weight_files(checkpoint.language_model), files)
    if checkpoint.base is None:
        return tensors
    tensors = {
        name: tensor for name, tensor in tensors.items() if "mm_projector" not in name
    }
    # where LLaVA writes the projector of a LoRA
    projector = checkpoint.directory / NON_LORA
    if not projector.is_file():
        raise FileNotFoundError(f"no {NON_LORA} in {checkpoint.directory}; {FIX}")
    for name, tensor in open_tensors([projector], files).items():
        short = name.removeprefix("base_model.")  # of peft's wrapper
        if short.startswith("model.model."):
            short = short.removeprefix("model.")
        tensors[short] = tensor
    return merged(tensors, checkpoint.directory, files)


LORA_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight$"
)
# settings of peft under which a merge is another sum, or more than one scale; LLaVA's training does
# not set them
OTHER_SUMS = (
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)
Halves = dict[str, dict[str, LazyTensor]]  # weight -> A and B of its LoRA


def merged(tensors: LazyTensors, directory: Path, files: ExitStack) -> LazyTensors:
    """``tensors`` with the adapter of ``directory`` merged into them, in fp16, as by LLaVA's loader
    with this environment's peft. Raises ContractError for an adapter of another kind, or of another
    model."""
    config = read_json(directory / ADAPTER)
    is_plain = (
        config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
    )
    if not is_plain or any(map(config.get, OTHER_SUMS)):
        raise ContractError(
            f"{directory / ADAPTER} has settings of another LoRA than LLaVA's training makes"
        )
    path = directory / "adapter_model.safetensors"
    if not path.is_file() and (directory / "adapter_model.bin").is_file():
        path = directory / "adapter_model.bin"
    halves = lora_halves(path, tensors, files)
    refuse_lost(path, tensors, halves, config.get("target_modules") or ())
    merged_tensors = dict(tensors)
    with errors_about(path, fix=FIX):
        for name, pair in halves.items():
            rank = pair["A"].shape[0]
            if rank != config["r"]:
                raise ValueError(
                    f"the LoRA of {name} has rank {rank}, expected {config['r']}"
                )
            divisor = rank**0.5 if config.get("use_rslora") else rank
            scale = config["lora_alpha"] / divisor
            read = partial(added, tensors[name], pair["A"], pair["B"], scale)
            shape = tensors[name].shape
            merged_tensors[name] = LazyTensor(shape=shape, read=read, where=str(path))
    return merged_tensors


def lora_halves(path: Path, tensors: LazyTensors, files: ExitStack) -> Halves:
    """The tensors of an adapter's file by the weight that they are added to, one of ``tensors``."""
    halves: Halves = {}
    for name, tensor in open_tensors([path], files).items():
        match = LORA_NAME.match(name)
        target = f"{match['module']}.weight" if match else name
        if match is None or target not in tensors:
            raise ContractError(
                f"{path}: {name} belongs to no weight of the base model; check --model-base"
            )
        halves.setdefault(target, {})[match["half"]] = tensor
    return halves


def refuse_lost(
    path: Path, tensors: LazyTensors, halves: Halves, target_modules: Iterable[object]
) -> None:
    """Raise ContractError if weights of ``target_modules`` have no LoRA in the file."""
    targets = {str(target).split(".")[-1] for target in target_modules}
    lost = []
    for name in tensors:
        if name.startswith("model.layers.") and name.endswith(".weight"):
            module = name.split(".")[-2]
            if module in targets and name not in halves:
                lost.append(name)
    if lost:
        raise ContractError(
            f"{path}: {len(lost)} target_modules have no LoRA, as {min(lost)}; {FIX}"
        )


def added(weight: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> Tensor:
    """The weight in fp16 with a LoRA's product."""
    if adapters_stay_fp32():
        return weight.read().half().add_((b.read().float() @ a.read().float()) * scale)
    delta = (b.read().half().float() @ a.read().half().float()) * scale
    return weight.read().half() + delta.half()
