"""Read the tensors of a checkpoint file or folder without running any code in it."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.outside.safetensors_header import read_header
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
        return _strip_prefixes(_read_safetensors(path))
    if path.suffix in PICKLE_SUFFIXES:
        return _strip_prefixes(_only_tensors(_read_pickle(path), path))
    raise ContractError(f"{path} is not a checkpoint; supported: .safetensors, {', '.join(PICKLE_SUFFIXES)}")


def read_tensor(path: Path, name: str) -> Tensor | None:
    """One tensor of a checkpoint file, None if it has no such tensor; errors as ``read_tensors``'.

    Of a .safetensors file nothing else is read.
    """
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
        if (directory / f"{name}.index.json").is_file():
            return _shards(directory / f"{name}.index.json")
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


def _shards(index: Path) -> list[Path]:
    """The files listed in an index of shards."""
    files = section(read_json(index), "weight_map", where=str(index)).values()
    if not files or not all(isinstance(file, str) for file in files):
        raise ContractError(f'{index} has no "weight_map" from tensors to files; download or copy it again')
    return sorted({index.parent / Path(file).name for file in files})


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ContractError(f"{path} is not a complete safetensors file ({error}); download it again") from error


def _read_pickle(path: Path) -> Any:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_TORCH:
        raise ContractError(
            f"{path} is a pickle, which torch {torch.__version__} cannot read safely (CVE-2025-32434, fixed in 2.6); "
            "import it in the training environment, or convert it to .safetensors"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ContractError(
            f"{path} {_refusal(str(error))}; nothing in it was run. Use a .safetensors file of these weights, or, if "
            "you trust this file, convert it to .safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        if "TorchScript" in str(error):
            raise ContractError(
                f"{path} is a TorchScript archive, which is a program; use the same weights from the Hub, "
                "for OpenAI's CLIP openai/clip-vit-*"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ContractError(f"{path} is not a complete torch checkpoint ({reason}); download it again") from error


def _refusal(reason: str) -> str:
    """Why a pickle is refused, from torch's own reason, which is long and explains how to run it nevertheless.

    >>> _refusal("Unsupported global: GLOBAL argparse.Namespace was not an allowed global by default.")
    'would run or construct argparse.Namespace'
    """
    name = re.search(r"(?:GLOBAL |<class ')([\w.]+)", reason)
    if name is None:
        return "contains code or objects other than tensors, or is not a torch checkpoint"
    return f"would run or construct {name[1]}"


def _only_tensors(value: Any, path: Path) -> dict[str, Tensor]:
    """The state dict, which may be inside a training checkpoint such as {epoch, name, state_dict}."""
    if not isinstance(value, dict):
        raise ContractError(f"{path} contains a {type(value).__name__}, expected a dict of tensors")
    value = next((value[name] for name in WRAPPERS if isinstance(value.get(name), dict)), value)
    if others := sorted(str(key) for key, item in value.items() if not isinstance(item, Tensor)):
        raise ContractError(f"{path}: values of {others[:10]} are not tensors; expected a dict of tensors")
    if not value:
        raise ContractError(f"{path} contains no tensors")
    return value


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes of DistributedDataParallel and torch.compile."""
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
