"""What the files of a source say: its preprocessing, its configuration, and its tensors, without running any code."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llm2clip_plugin.files import ContractError, load_tensors, read_header
from llm2clip_plugin.vision.directory import PREPROCESSOR_FILE, fetch_directory, read_json
from llm2clip_plugin.vision.families import family_of, read_config
from llm2clip_plugin.vision.family import RESAMPLE, Tower

# Image preprocessing of a tower, as a CLIPImageProcessor's configuration, which is what LLaVA reads.

INHERITED = ("image_mean", "image_std", "resample")  # from the source's own preprocessor_config.json
UNNORMALIZED = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}


def own_preprocessor(directory: Path) -> dict[str, Any]:
    """Mean, standard deviation and resampling in a directory's preprocessor_config.json; {} without one.

    Pixels that are not normalized (``do_normalize`` false: RADIO does that itself) have mean 0 and deviation 1.
    """
    if not (directory / PREPROCESSOR_FILE).is_file():
        return {}
    body = read_json(directory / PREPROCESSOR_FILE)
    own = {name: body[name] for name in INHERITED if name in body}
    return own | (UNNORMALIZED if body.get("do_normalize") is False else {})


def preprocessor_config(source: Tower | str | os.PathLike[str]) -> dict[str, Any]:
    """preprocessor_config.json for a tower or a tower directory.

    Mean, standard deviation and resampling are those of the source's own file or configuration, else the family's; the
    crop is the tower's image size, because SigLIP's and DINOv2's own files have no ``crop_size`` or another size.
    """
    if isinstance(source, nn.Module):
        tower: Tower = source
        family, config, own = family_of(tower), tower.config, getattr(tower, "own_preprocessor", {})
    else:
        directory = fetch_directory(source)
        (family, config), own = read_config(directory), own_preprocessor(directory)
    own = {name: value for name, value in config.to_dict().items() if name in INHERITED and value} | own
    size = config.image_size
    return {
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
        "crop_size": {"height": size, "width": size},
        "image_mean": list(own.get("image_mean", family.mean)),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(own.get("image_std", family.std)),
        "resample": own.get("resample", 3),  # PIL's bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


# The configuration of a checkpoint: the file next to it, with the user's --config on top.


def config_in(path: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """The configuration file in the folder of a checkpoint, which may hold OpenCLIP's beside Hugging Face's; or {}."""
    is_open_clip = any(key.startswith("visual.") for key in state)
    names = ("open_clip_config.json", "config.json") if is_open_clip else ("config.json",)
    return next((read_json(path / name) for name in names if (path / name).is_file()), {})


def preprocessor_in(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Mean, deviation, filter of OpenCLIP's ``preprocess_cfg``, else of the folder's preprocessor_config.json."""
    return normalization(section(config, "preprocess_cfg")) if "model_cfg" in config else own_preprocessor(path)


def normalization(values: dict[str, Any]) -> dict[str, Any]:
    """Mean, deviation and filter, under Hugging Face's names, of OpenCLIP's or timm's ``values``."""
    own = {f"image_{key}": values[key] for key in ("mean", "std") if key in values}
    resample = RESAMPLE.get(str(values.get("interpolation")))
    return own if resample is None else {**own, "resample": resample}


def lift_model_cfg(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the fields of ``model_cfg``, where OpenCLIP's files on the Hub nest them, at the top."""
    return {**config, **section(config, "model_cfg")}


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``below`` overridden by ``above``, key by key in nested objects too."""
    nested = {key for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)}
    return {**below, **above, **{key: merge(below[key], above[key]) for key in nested}}


def section(config: dict[str, Any], name: str, *, where: str = "config.json") -> dict[str, Any]:
    """An object inside a JSON object, {} if it is absent or null; ContractError for anything else."""
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise ContractError(f'{where}: "{name}" is {value!r}, expected an object')
    return value or {}


def vision_fields(config: Any) -> dict[str, Any]:
    """OpenCLIP's ``vision_cfg`` for the configuration of a CLIP or EVA-CLIP tower."""
    return {
        "image_size": config.image_size,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "head_width": config.hidden_size // config.num_attention_heads,
        "patch_size": config.patch_size,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
    }


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
        state = _read_pickle(path)
        if isinstance(state, dict):  # it may be inside a training checkpoint such as {epoch, name, state_dict}
            state = next((state[name] for name in WRAPPERS if isinstance(state.get(name), dict)), state)
        if not isinstance(state, dict) or not state or not all(isinstance(item, Tensor) for item in state.values()):
            raise ContractError(f"{path} does not contain a dict of tensors")
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
    """The weight files of a folder: one with a standard name, the shards of an index, or its only checkpoint."""
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
        raise ContractError(f"{directory} has several checkpoints; choose one of {', '.join(p.name for p in files)}")
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
            "import it in the training environment"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own reason is long and explains how to run the file nevertheless
        name = re.search(r"(?:GLOBAL |<class ')([\w.]+)", str(error))
        reason = f"would run or construct {name[1]}" if name else "contains other objects than tensors"
        raise ContractError(f"{path} {reason}; nothing in it was run. Use the weights as .safetensors") from error
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ContractError(f"{path} is not a complete torch checkpoint ({reason}); download it again") from error
