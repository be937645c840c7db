"""Read the tensors of a checkpoint file or folder without running any code in it."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.outside.safetensors_header import load_tensors, read_header
from llm2clip_plugin.vision.convert.source_config import section
from llm2clip_plugin.vision.directory import read_json

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
SAFE_TORCH = (2, 6)  # older versions run code in spite of `weights_only=True` (CVE-2025-32434)
WRAPPERS = ("model", "module", "state_dict")  # of a training checkpoint, in the reference's order
WEIGHT_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors, .pt, .pth or .bin file by name, without wrappers and ``module.`` prefixes.

    Raises ContractError if the file is incomplete, contains code or anything but tensors, or has an unknown suffix.
    """
    if path.suffix == ".safetensors":
        state = load_tensors(path, fix="download it again")
    elif path.suffix in PICKLE_SUFFIXES:
        state = _only_tensors(_read_pickle(path), path)
    else:
        raise ContractError(f"{path} is not a checkpoint; supported: .safetensors, {', '.join(PICKLE_SUFFIXES)}")
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def read_tensor(path: Path, name: str) -> Tensor | None:
    """One tensor of a checkpoint file, None if it has no such tensor; of a .safetensors file nothing else is read."""
    if path.suffix != ".safetensors":
        return read_tensors(path).get(name)
    if name not in read_header(path).entries:
        return None
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a folder: one with a standard name, the shards of an index, or its only checkpoint.

    Raises FileNotFoundError if there is none, ContractError if several qualify.
    """
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            return [directory / name]
        if (index := directory / f"{name}.index.json").is_file():
            shards = section(read_json(index), "weight_map", where=str(index)).values()
            return sorted({directory / Path(shard).name for shard in shards})
    files = sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", *PICKLE_SUFFIXES))
    if not files:
        raise FileNotFoundError(f"no checkpoint in {directory}: no .safetensors, {', '.join(PICKLE_SUFFIXES)} file")
    if len(files) > 1:
        raise ContractError(
            f"{directory} contains several checkpoints; choose one of {', '.join(p.name for p in files)}"
        )
    return files


def check_pickles(directory: Path) -> None:
    """Raise ContractError if a model's weights are only in a pickle that runs code, or is not safe to read."""
    if any(directory.glob("model*.safetensors")):
        return
    for path in sorted(directory.glob("pytorch_model*.bin")):
        read_tensors(path)


def _read_pickle(path: Path) -> Any:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_TORCH:
        raise ContractError(
            f"{path} is a pickle, which torch {torch.__version__} cannot read safely (CVE-2025-32434, fixed in 2.6); "
            "import it in the training environment, or convert it to .safetensors"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own reason is long and explains how to run the file nevertheless
        name = re.search(r"(?:GLOBAL |<class ')([\w.]+)", str(error))
        reason = f"would run or construct {name[1]}" if name else "contains other objects than tensors"
        raise ContractError(
            f"{path} {reason}; nothing in it was run. Use a .safetensors file of the weights"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        if "TorchScript" in str(error):
            raise ContractError(
                f"{path} is a TorchScript archive, a program; use the same weights from the Hub"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ContractError(f"{path} is not a complete torch checkpoint ({reason}); download it again") from error


def _only_tensors(value: Any, path: Path) -> dict[str, Tensor]:
    """The state dict, which may be inside a training checkpoint such as {epoch, name, state_dict}."""
    if isinstance(value, dict):
        value = next((value[name] for name in WRAPPERS if isinstance(value.get(name), dict)), value)
    if not isinstance(value, dict) or not value or not all(isinstance(item, Tensor) for item in value.values()):
        raise ContractError(f"{path} does not contain a dict of tensors")
    return value
