"""Vision towers by family: load, resize, and the parts that training and export need to name.

Every tower is a Hugging Face vision model: ``pixel_values`` (B, 3, S, S) in; ``last_hidden_state``,
``pooler_output`` and, when asked, ``hidden_states`` out. The states mean the same for every family:
blocks + 1 tensors (B, T, H), the first one the input of the first block, each next one the output of a block
before any final norm; the class token, if there is one, in front.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.families import families
from llm2clip_plugin.vision.family import Family, Tower
from llm2clip_plugin.vision.positions import check_pixels, resize_positions

PREPROCESSOR_FILE = "preprocessor_config.json"
TIMM_PREFIX = "timm:"
KEPT_OF_PREPROCESSOR = ("image_mean", "image_std", "resample")  # what a source's own file decides


def family_named(name: str) -> Family:
    """The family of that name; ValueError lists the known ones."""
    if name not in families():
        raise ValueError(f"unknown tower family {name!r}; known: {', '.join(sorted(families()))}")
    return families()[name]


def family_of_type(model_type: str, *, where: str) -> Family:
    """The family whose config.json has this ``model_type``; ``where`` is named in the error."""
    for family in families().values():
        if model_type in family.model_types:
            return family
    known = sorted(kind for family in families().values() for kind in family.model_types)
    raise ValueError(f"{where} has model_type {model_type!r}, which is no known tower; known: {', '.join(known)}")


def family_of(tower: Tower) -> Family:
    """The family of a loaded tower."""
    return family_of_type(tower.config.model_type, where=type(tower).__name__)


def fetch_directory(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """A local directory for a path or a Hub id (``owner/name``), downloaded if need be.

    Raises FileNotFoundError if it is neither an existing directory nor looks like a Hub id.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = str(source)
    if path.exists():
        raise FileNotFoundError(
            f"{path} is a file, not a tower directory; `llm2clip import` turns checkpoints into one"
        )
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"no file or directory {name}, and it is no Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.bin", "*.pt"]))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are OSError (network, missing) or ValueError
        raise FileNotFoundError(f"no directory {name}, and the Hub does not give {name}: {error}") from error
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; FileNotFoundError or ContractError names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; `llm2clip import` makes a tower directory")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ContractError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(body, dict):
        raise ContractError(f"{path} holds a {type(body).__name__}, expected an object")
    return body


def load_tower(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    revision: str | None = None,
) -> Tower:
    """A vision model from a tower directory, a plain Hugging Face directory, a Hub id or ``timm:NAME``, in eval mode.

    ``dtype`` is always said: transformers 4 reads half-precision files as float32, transformers 5 does not.
    ``image_size`` other than the directory's own resizes the positions once (see ``resize_tower``); images of any
    other size are refused by the forward pass.
    Raises FileNotFoundError (nothing there), ValueError (unknown family), ContractError (weights that don't fit the
    config: a missing, unknown or misshapen tensor is named).
    """
    if str(source).startswith(TIMM_PREFIX):
        from llm2clip_plugin.vision.timm_tower import timm_tower

        tower = timm_tower(str(source).removeprefix(TIMM_PREFIX)).to(dtype)
    else:
        tower = _load_directory(fetch_directory(source, revision=revision), dtype)
    _refuse_other_sizes(tower)
    if image_size is not None and image_size != tower.config.image_size:
        tower = resize_tower(tower, image_size)
    return tower


def _load_directory(directory: Path, dtype: torch.dtype) -> Tower:
    """The tower in a directory, every tensor of its file used and none missing."""
    config = read_json(directory / "config.json")
    family = family_of_type(str(config.get("model_type")), where=str(directory / "config.json"))
    read = functools.partial(
        family.vision_class().from_pretrained, directory, torch_dtype=dtype, output_loading_info=True
    )
    try:
        tower, info = read()
    except RuntimeError:  # tensors of another shape: named only where they may pass; refused below all the same
        try:
            tower, info = read(ignore_mismatched_sizes=True)  # not at once: under ZeRO-3 every parameter is empty here
        except RuntimeError as error:
            raise ContractError(f"the weights in {directory} don't fit its config.json: {error}") from error
    # older files of the hub hold position_ids: a counter, no weight
    strays = [key for key in info["unexpected_keys"] if not key.endswith("embeddings.position_ids")]
    unknown = sorted(key for key in strays if not key.startswith(family.beside_tower))
    misshapen = {
        name: f"{tuple(found)}, expected {tuple(expected)}" for name, found, expected in info["mismatched_keys"]
    }
    missing = sorted(set(info["missing_keys"]) - set(misshapen))
    if missing or unknown or misshapen:
        raise ContractError(
            f"the weights in {directory} don't fit its config.json: missing {missing}, unknown {unknown}, "
            f"misshapen {[f'{name} is {shapes}' for name, shapes in sorted(misshapen.items())]}"
        )
    tower.own_preprocessor = own_preprocessor(directory)
    return tower


def own_preprocessor(directory: Path) -> dict[str, Any]:
    """What a directory's own preprocessor_config.json says of mean, deviation and resampling; {} without one."""
    if not (directory / PREPROCESSOR_FILE).is_file():
        return {}
    body = read_json(directory / PREPROCESSOR_FILE)
    return {name: body[name] for name in KEPT_OF_PREPROCESSOR if name in body}


def resize_tower(tower: Tower, image_size: int) -> Tower:
    """The same tower for another image size: a new model, positions interpolated, all else copied.

    ``config.resized_from`` keeps the size that the positions were learned at, so it reaches the card.
    Raises ValueError if the size is not a multiple of the patch size.
    """
    family, config = family_of(tower), copy.deepcopy(tower.config)
    check_size(config, image_size)
    old_size, config.image_size = config.image_size, image_size
    config.resized_from = resized_from(tower) or old_size
    state = tower.state_dict()
    name = core_prefix(tower) + family.positions
    if family.positions and name in state:  # some timm models have no table
        rows = config.to_dict().get("position_class_rows", int(family.has_cls))
        old_grid, new_grid = old_size // config.patch_size, image_size // config.patch_size
        state[name] = resize_positions(state[name], class_rows=rows, old_grid=old_grid, new_grid=new_grid)
    resized = type(tower)(config).to(device=tower.device, dtype=tower.dtype)
    try:
        resized.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{config.model_type} cannot be resized by its table of positions alone: {error}") from error
    _refuse_other_sizes(resized)
    resized.own_preprocessor = tower.own_preprocessor if hasattr(tower, "own_preprocessor") else {}
    return resized.train(tower.training)


def _refuse_other_sizes(tower: Tower) -> None:
    """Have the forward pass refuse images of another size than the configuration's: DINOv2 would interpolate its
    positions in silence, each version of transformers in its own way."""
    tower.register_forward_pre_hook(_check_images, with_kwargs=True)


def _check_images(tower: Tower, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check_pixels(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0], tower.config.image_size)


def check_size(config: Any, image_size: int) -> None:
    """ValueError if ``image_size`` is not whole patches."""
    if image_size % config.patch_size:
        size = image_size // config.patch_size * config.patch_size
        raise ValueError(f"image_size {image_size} is not a multiple of the patch size {config.patch_size}; try {size}")


def resized_from(tower: Tower) -> int:
    """The image size that the tower's positions were learned at, if it was resized since; else 0."""
    return tower.config.to_dict().get("resized_from", 0)


def core_prefix(tower: Tower) -> str:
    """``"vision_model."`` where transformers wraps the tower (4.x CLIP and SigLIP), else ``""``."""
    return "vision_model." if "vision_model" in dict(tower.named_children()) else ""


def core_of(tower: Tower) -> Any:
    """The module that holds embeddings, blocks and final norm."""
    return tower.get_submodule(core_prefix(tower).rstrip("."))


def tower_blocks(tower: Tower) -> nn.ModuleList:
    """The transformer blocks, first to last: for layer-wise decay and freezing."""
    return core_of(tower).get_submodule(family_of(tower).blocks)


def tower_embeddings_parameters(tower: Tower) -> list[nn.Parameter]:
    """The parameters below the first block (patch projection, positions, class token, a norm before the blocks)."""
    below = tuple(core_prefix(tower) + name for name in family_of(tower).embeddings)
    return [
        parameter
        for name, parameter in tower.named_parameters()
        if name in below or name.startswith(tuple(f"{prefix}." for prefix in below))
    ]


def final_norm(tower: Tower) -> nn.Module:
    """The norm behind the last block."""
    return core_of(tower).get_submodule(family_of(tower).final_norm)


def freeze_tower(tower: Tower, *, first_blocks: int | None = None) -> None:
    """Stop gradients for the whole tower, or for its embeddings and its first blocks.

    Raises ValueError if the tower has fewer blocks.
    """
    if first_blocks is None:
        tower.requires_grad_(False)
        return
    blocks = tower_blocks(tower)
    if not 0 <= first_blocks <= len(blocks):
        raise ValueError(f"cannot freeze the first {first_blocks} blocks of a tower of {len(blocks)}")
    for parameter in tower_embeddings_parameters(tower) if first_blocks else ():
        parameter.requires_grad_(False)
    for block in blocks[:first_blocks]:
        block.requires_grad_(False)


def preprocessor_config(source: Tower | str | os.PathLike[str], *, image_size: int | None = None) -> dict[str, Any]:
    """The image preprocessing of a tower, in the form of CLIPImageProcessor, which LLaVA needs.

    Mean, deviation and resampling come from the directory's own file, else from the family; the crop is the tower's
    image size. SigLIP's and DINOv2's own files lack ``crop_size`` or crop another size than the positions have.
    """
    if isinstance(source, nn.Module):
        tower: Tower = source
        family, config = family_of(tower), tower.config
        own = tower.own_preprocessor if hasattr(tower, "own_preprocessor") else {}
    else:
        directory = fetch_directory(source)
        model_type = str(read_json(directory / "config.json").get("model_type"))
        family = family_of_type(model_type, where=str(directory / "config.json"))
        config, own = load_config(directory, family), own_preprocessor(directory)
    size = image_size or config.image_size
    chosen = {name: value for name, value in config.to_dict().items() if name in KEPT_OF_PREPROCESSOR and value} | own
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(chosen.get("image_mean", family.mean)),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(chosen.get("image_std", family.std)),
        "resample": chosen.get("resample", 3),  # PIL's bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def load_config(directory: Path, family: Family) -> Any:
    """The vision configuration of a directory, taken out of a whole model's where it is nested."""
    return family.vision_class().config_class.from_pretrained(directory)
