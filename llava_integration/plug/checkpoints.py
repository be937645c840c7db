"""What LLaVA makes of a checkpoint's folder, its name and its files, and of the options of a
training; no torch.

LLaVA decides by words in the folder's name how to load it: one without "llava" is a language model
without images, one without "lora" a projector, one with "mpt" or "mistral" a model of that kind.
All is checked before anything is loaded.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hub import split_revision
from llm2clip_plugin.options import unknown
from llm2clip_plugin.safetensors_header import read_header
from llm2clip_plugin.vision.directory import read_json, weight_files

HUB_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?$")
CONFIG = "config.json"
WORD = "llava"
LORA = "lora"
OTHERS = ("mpt", "mistral")
FEATURES = ("patch", "cls_patch")
FIX = "copy the checkpoint again"


def checkpoint_config(folder: Path) -> dict[str, Any]:
    """config.json of a LLaVA checkpoint. Raises FileNotFoundError without one, ContractError for a
    damaged one."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} is not a LLaVA checkpoint: no {CONFIG} in it"
        )
    return read_json(folder / CONFIG)


def check_checkpoint(path: str, base: str | None = None) -> None:
    """Compare a checkpoint's name and files with what LLaVA will make of them, given ``base``; Hub
    ids are left to LLaVA. Raises FileNotFoundError, ValueError or ContractError with the file."""
    refuse_name(path, base=base)
    for option, name in (("--model-path", path), ("--model-base", base)):
        if name and not Path(name).expanduser().is_dir() and not HUB_ID.match(name):
            raise FileNotFoundError(
                f"{option} {name} is neither a folder nor a Hub id; expected a LLaVA checkpoint"
            )
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return
    checkpoint_config(folder)
    for file in folder.glob("*.safetensors"):
        read_header(file, fix=FIX)


def model_name(path: str) -> str:
    """The name that LLaVA's get_model_name_from_path derives from a path: its last part, with that
    above checkpoint-N.

    >>> model_name("runs/llava-7b/checkpoint-100/")
    'llava-7b_checkpoint-100'
    """
    parts = path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def refuse_name(path: str, *, base: str | None = None, name: str | None = None) -> None:
    """Raise ValueError if LLaVA would load its checkpoint at ``path`` as another kind of model than
    it is. ``base``: the base model that is given with it; ``name``: in place of the folder's."""
    config = config_of(path)
    model_type = str(config.get("model_type"))
    if "mm_vision_tower" not in config and not model_type.startswith(WORD):
        return
    lower_name = (model_name(str(path)) if name is None else name).lower()
    has_lora = (Path(path).expanduser() / "adapter_config.json").is_file()
    what = ""
    if WORD not in lower_name:
        what = f'without "{WORD}" in its name as a language model that sees no images'
    elif has_lora and base and LORA not in lower_name:
        what = f'without "{LORA}" in its name, given a base model, as a projector'
    elif model_type == "llava_llama":
        others = [word for word in OTHERS if word in lower_name]
        if others:
            what = f'with "{others[0]}" in its name as a {others[0]} model'
    if what:
        better = "llava-lora-1" if has_lora else "llava-1"
        raise ValueError(
            f"LLaVA loads a folder {what}; {path} is a LLaVA checkpoint: "
            f"rename it, such as to {better}"
        )


def config_of(path: str | Path, name: str = CONFIG) -> dict[str, Any]:
    """A model's config.json; {} without one, for a Hub id and for a damaged file, which loading
    will refuse."""
    file = Path(path).expanduser() / name
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def sample_sha256(folder: str | Path) -> str:
    """SHA-256 over a part of a checkpoint's weights: 64 KiB every 16 MiB, from each file's end. A
    second for 7B."""
    files = Path(folder).expanduser()
    return sample_of(sorted([*files.glob("*.safetensors"), *files.glob("*.bin")]))


def sample_of(files: Iterable[Path]) -> str:
    """SHA-256 over 64 KiB every 16 MiB, from each file's end."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            for end in range(file.seek(0, 2), 0, -(1 << 24)):
                file.seek(max(0, end - (1 << 16)))
                digest.update(file.read(1 << 16))
    return digest.hexdigest()


def model_sample(name: str) -> str:
    """`sample_of` the weights that are loaded by a model's path or Hub id; "" for a Hub id that is
    not downloaded, and for a folder with other files than transformers reads."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and HUB_ID.match(name):
        from huggingface_hub import try_to_load_from_cache

        repository, revision = split_revision(name)
        config = try_to_load_from_cache(repository, CONFIG, revision=revision)
        if isinstance(config, str):
            folder = Path(config).parent
    try:
        return sample_of(weight_files(folder))
    except (OSError, ContractError):
        return ""


def is_unfrozen(config: Any) -> bool:
    """Whether the tower is trained, by ``unfreeze_mm_vision_tower`` or LLaVA-NeXT's
    ``mm_tunable_parts``. ``config``: a model's configuration or arguments, or a dictionary of
    config.json."""
    if isinstance(config, dict):
        unfreezes = config.get("unfreeze_mm_vision_tower")
        parts = config.get("mm_tunable_parts")
    else:
        unfreezes = getattr(config, "unfreeze_mm_vision_tower", None)
        parts = getattr(config, "mm_tunable_parts", None)
    return bool(unfreezes) or "mm_vision_tower" in (parts or "").split(",")


def check_feature(feature: str) -> None:
    """Raise ValueError for an unknown ``mm_vision_select_feature``."""
    if feature not in FEATURES:
        raise ValueError(unknown("mm_vision_select_feature", feature, FEATURES))


def blocks_below(select_layer: int, num_layers: int) -> int:
    """Blocks below the selected state, ValueError without it: 24 blocks have 25, so layer -2 is
    that after block 23."""
    states = num_layers + 1
    if not -states <= select_layer < states:
        problem = f"a tower of {num_layers} blocks has hidden states {-states} to {states - 1}"
        raise ValueError(
            f"mm_vision_select_layer {select_layer} is out of range: {problem}"
        )
    return select_layer % states
