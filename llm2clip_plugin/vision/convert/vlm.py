"""The tower inside a vision-language model, for ``llm2clip import VLM --part vision``. Only the
tower's tensors are read.

| files of                              | the tower's tensors         | its settings    |
|---------------------------------------|-----------------------------|-----------------|
| Hugging Face's LLaVA, PaliGemma, ...  | (model.)vision_tower.*      | vision_config   |
| OpenGVLab's InternVL, image-text ones | (model.)vision_model.*      | vision_config   |
| Qwen2.5-VL, Qwen3-VL                  | (model.)visual.*            | vision_config   |
| LLaVA's own code                      | vision_tower.vision_tower.* | mm_vision_tower |
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hub import can_only_be_a_path, hub_snapshot
from llm2clip_plugin.safetensors_header import read_header
from llm2clip_plugin.vision.directory import (
    CONFIG_FILE,
    WEIGHT_FILES,
    read_json,
    read_tensors,
    section,
    weight_files,
)
from llm2clip_plugin.vision.families import families, is_known_inside, no_family

# before the names of a tower's tensors; the first that a checkpoint has is its own
PREFIXES = (
    "model.vision_tower.vision_tower.",
    "vision_tower.vision_tower.",
    "model.vision_tower.",
    "vision_tower.",
    "model.visual.",
    "visual.",
    "model.vision_model.",
    "vision_model.",
)
# how the model_type begins of vision models alone that are imported as another family's
OF_VISION_MODELS = ("intern_vit", "timm")
LLAVA_TOWER = "mm_vision_tower"  # of LLaVA's config.json: a path or a Hub id


class VisionPart(NamedTuple):
    """What a vision-language model has of its tower, as a checkpoint of the vision model alone."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    note: str  # what was read, for the report


def fetch_vision_part(source: str | os.PathLike[str]) -> Path:
    """A local folder (or file) of a vision-language model; from the Hub, the configurations and the
    weight files that have tensors of the tower. Raises FileNotFoundError."""
    path = Path(source).expanduser()
    name = str(source)
    if path.exists():
        return path
    if can_only_be_a_path(name) or "/" not in name:
        raise FileNotFoundError(f"{name} is not a directory or a Hub id (owner/name)")
    try:
        folder = hub_snapshot(name, patterns=["*.json"])
        indexed = indexed_files(folder)
        if indexed is None:
            wanted = ["*.safetensors"]
        else:
            prefix = prefix_in(indexed)
            inside = [name for name in indexed if prefix and name.startswith(prefix)]
            wanted = sorted({indexed[name] for name in inside})
        folder = hub_snapshot(name, patterns=["*.json", *wanted])
        if indexed is None and not any(folder.glob("*.safetensors")):
            folder = hub_snapshot(name, patterns=["*.json", "*.bin"])
    except (OSError, ValueError) as error:
        # huggingface_hub's errors are OSError (network, missing) or ValueError
        raise FileNotFoundError(
            f"{name} is not a directory and cannot be downloaded from the Hub: {error}"
        ) from error
    return folder


def indexed_files(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name, of a checkpoint in shards; None without an index."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return None
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = section(read_json(index), "weight_map", where=str(index))
            return {key: Path(str(file)).name for key, file in files.items()}
    return None


def prefix_in(names: Mapping[str, Any]) -> str:
    """What the names of the tower's tensors begin with; "" if there are none."""
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in names):
            return prefix
    return ""


def read_vision_part(path: Path, passed_config: dict[str, Any]) -> VisionPart:
    """The tower's tensors and settings of a vision-language model in a folder or a file.

    ``passed_config``, of --config: fields of the vision model, which override its own. Raises
    ValueError for a tower that is of no family here, or whose settings are nowhere;
    FileNotFoundError, ContractError for damaged files.
    """
    file = path / CONFIG_FILE
    config = read_json(file) if file.is_file() else {}
    check_is_whole(path, config)
    if "vision_config" in config:
        check_inside(path, config, passed_config)
    names = file_of_each_tensor(path)
    prefix = prefix_in(names)
    if not prefix:
        raise ValueError(f"{path}: {no_tower(config)}")
    state = read_prefixed(names, prefix)
    vision = {**settings_inside(path, config, passed_config), **passed_config}
    kind = vision.get("model_type") or config.get("model_type")
    whole = str(config.get("model_type") or "model")
    note = f"vision part of a {whole}: {len(state)} of {len(names)} tensors, {prefix}*"
    return VisionPart(state, {**vision, "model_type": kind}, note)


def check_is_whole(path: Path, config: dict[str, Any]) -> None:
    """ValueError for a vision model, which has no part to take out."""
    if "vision_config" in config or config.get(LLAVA_TOWER):
        return
    kind = str(config.get("model_type") or config.get("architecture"))
    is_family = any(kind in family.model_types for family in families().values())
    if is_family or kind.startswith(OF_VISION_MODELS) or "architecture" in config:
        raise ValueError(
            f"{path} is a vision model ({kind}), not a vision-language model; leave out --part"
        )


def check_inside(
    path: Path, config: dict[str, Any], passed_config: dict[str, Any]
) -> None:
    """ValueError for a vision part that no family or layout reads, before weights are read."""
    vision = {**section(config, "vision_config"), **passed_config}
    if not vision and not config.get(LLAVA_TOWER):
        raise ValueError(
            f"{path / CONFIG_FILE}: vision_config is empty, expected the tower's settings; pass "
            "the config.json of its vision model as --config"
        )
    kind = str(config.get("model_type"))
    if not is_known_inside(str(vision.get("model_type") or kind)):
        raise ValueError(
            f"{path} {no_family(kind, {**config, 'vision_config': vision})}"
        )


def file_of_each_tensor(path: Path) -> dict[str, Path]:
    """Tensor name -> file; of files without an index, by their headers."""
    indexed = indexed_files(path) if path.is_dir() else None
    if indexed is not None:
        return {name: path / file for name, file in indexed.items()}
    names: dict[str, Path] = {}
    for file in weight_files(path) if path.is_dir() else [path]:
        if file.suffix == ".safetensors":
            present = read_header(file, fix="download it again").entries
        else:
            present = read_tensors(file)
        names.update(dict.fromkeys(present, file))
    return names


def read_prefixed(names: dict[str, Path], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it; Qwen's keep one, by which their
    layouts know them. Of a .safetensors file nothing else is read."""
    kept = "model.visual." if prefix.endswith("visual.") else ""
    state: dict[str, Tensor] = {}
    wanted = [name for name in names if name.startswith(prefix)]
    for file in sorted({names[name] for name in wanted}):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing, which the index of {file.parent} names; download it again"
            )
        inside = [name for name in wanted if names[name] == file]
        tensors = read_some(file, inside)
        for name, value in tensors.items():
            state[kept + name.removeprefix(prefix)] = value
    return state


def read_some(file: Path, names: list[str]) -> dict[str, Tensor]:
    """Tensors of a file by name; ContractError without one of them."""
    if file.suffix != ".safetensors":
        tensors = read_tensors(file)
        check_present(file, names, tensors)
        return {name: tensors[name] for name in names}
    from safetensors import safe_open

    header = read_header(file, fix="download it again")
    check_present(file, names, header.entries)
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in names}


def check_present(file: Path, names: list[str], present: Mapping[str, Any]) -> None:
    """ContractError for tensors that the index says are in a file, and are not."""
    absent = [name for name in names if name not in present]
    if absent:
        problem = f"{file} has no tensor {absent[0]}"
        if len(absent) > 1:
            problem += f" and {len(absent) - 1} others"
        raise ContractError(
            f"{problem}, which the index of {file.parent} says it has; download both again"
        )


def settings_inside(
    path: Path, config: dict[str, Any], passed_config: dict[str, Any]
) -> dict[str, Any]:
    """The vision model's config.json: ``vision_config``, or what LLaVA's ``mm_vision_tower`` names.
    ValueError where neither tells and --config does not."""
    vision = section(config, "vision_config")
    if vision:
        return vision
    tower = str(config.get(LLAVA_TOWER) or "").removeprefix("llm2clip:")
    for family in families().values():
        if tower in family.shapes:
            return {"model_type": family.model_types[0], **family.shapes[tower]}
    if tower and (Path(tower).expanduser() / CONFIG_FILE).is_file():
        body = read_json(Path(tower).expanduser() / CONFIG_FILE)
        return section(body, "vision_config") or body
    if "model_type" in passed_config:
        return {}
    if tower:
        problem = f"config.json has {LLAVA_TOWER} {tower!r}, which does not tell the tower's sizes"
    elif path.is_file():
        problem = "a file of weights does not tell the tower's sizes"
    elif not (path / CONFIG_FILE).is_file():
        problem = "config.json, which tells the tower's sizes, is missing"
    else:
        problem = (
            f"config.json has no vision_config or {LLAVA_TOWER}, which tell the sizes"
        )
    raise ValueError(
        f"{path}: {problem}; pass the config.json of its vision model as --config"
    )


def no_tower(config: dict[str, Any]) -> str:
    """Why a checkpoint has no tensors of a tower, and what to do."""
    if tower := config.get(LLAVA_TOWER):
        return (
            "the checkpoint has no tensors of a tower, which LLaVA saves only if it was trained; "
            f"import its tower itself: {tower}"
        )
    kind = config.get("model_type", "checkpoint")
    prefixes = ", ".join(f"{prefix}*" for prefix in PREFIXES)
    return f"a {kind} without a vision part; none of its tensors is named {prefixes}"
