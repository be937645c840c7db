"""A tower directory: the settings of its dual encoder, its files, where to get one, its hashes, the
places in its card.

And the tensors of any checkpoint, read without running code; torch is imported when they are.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2clip_plugin.contracts import POST_FILE, TowerCard
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hashes import sha256_weights
from llm2clip_plugin.hub import can_only_be_a_path, hub_snapshot
from llm2clip_plugin.json_files import read_json_value
from llm2clip_plugin.options import setting
from llm2clip_plugin.safetensors_header import load_tensors, read_header

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "text_adapter.safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"
# where transformers 5 saves the image processor of a model that also reads texts
PROCESSOR_FILE = "processor_config.json"
CONFIG_FILE = "config.json"

# where CLIP's own training starts (arXiv 2103.00020, section 2.5)
LOG_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True, kw_only=True)
class DualConfig:
    """How image features and LLM embeddings are mapped to one space."""

    projection_dim: int = setting(
        1280,
        help="width of the space that images and captions share",
        learned=True,
    )
    llm_width: int = setting(
        0,
        help="width of an LLM embedding; 0: no text adapter, only a projection",
        learned=True,
    )
    pool: str = setting(
        "pooled",
        help="image feature: pooled (the family's own) | cls | mean (of patches) | cls_mean "
        "(concatenated)",
        learned=True,
    )
    projection: str = setting(
        "linear",
        help="linear | mlp (LIFT's: two linear layers, GELU between) | none (the pooled feature; "
        "--dual.projection-dim is its width)",
        learned=True,
    )
    projection_norm: bool = setting(
        False, help="a LayerNorm before the projection", learned=True
    )
    projection_bias: bool = setting(
        False,
        help="a bias in the linear projection, initially 0",
        learned=True,
    )
    projection_init_std: float | None = setting(
        None,
        help="std of the projection's initial weights; None: width ** -0.5",
        learned=True,
        initial=True,
    )
    adapter: str = setting(
        "mlp",
        help="text adapter: mlp (the paper's) | linear | none (the projection then has "
        "the LLM's width)",
        learned=True,
    )
    adapter_blocks: int = setting(4, help="residual MLP blocks", learned=True)
    adapter_expansion: int = setting(
        2,
        help="hidden width of a block, in multiples of the LLM's width",
        learned=True,
    )
    normalize_input: bool = setting(
        True,
        help="L2-normalize LLM embeddings first",
        formerly=("normalise_input",),
        learned=True,
    )
    input_scale: str = setting(
        "unit",
        help="unit | sqrt_width: factor on the normalized embedding",
        learned=True,
    )
    input_noise: float = setting(
        0.0,
        help="standard deviation of Gaussian noise on the scaled embedding, in training only",
        learned=True,
    )
    logit_scale_init: float | None = setting(
        None,
        help="natural log of the initial scale; None: the tower's own, else log(100) for CLIP and "
        "EVA02, log(1 / 0.07) for others",
        learned=True,
        initial=True,
    )
    logit_bias_init: float | None = setting(
        None,
        help="initial value of a learned bias, for SigLIP's sigmoid loss (paper: -10)",
        learned=True,
    )


def fetch_directory(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    also: tuple[str, ...] = (),
) -> Path:
    """A local directory for a path or a Hub id (``owner/name``, or ``owner/name@revision``),
    downloaded if necessary. Raises FileNotFoundError. ``also``: patterns of further files to
    download, with the configurations and weights."""
    path = Path(source).expanduser()
    name = str(source)
    if path.is_dir():
        return path
    if path.exists() or can_only_be_a_path(name) or "/" not in name:
        raise FileNotFoundError(f"{name} is not a directory or a Hub id (owner/name)")
    try:
        directory = hub_snapshot(
            name, revision=revision, patterns=["*.json", "*.safetensors", *also]
        )
        if not any(directory.glob("*.safetensors")):
            directory = hub_snapshot(
                name, revision=revision, patterns=["*.json", "*.bin", "*.pt", *also]
            )
    except (OSError, ValueError) as error:
        # huggingface_hub's errors are OSError (network, missing) or ValueError
        raise FileNotFoundError(
            f"{name} is not a directory and cannot be downloaded from the Hub: {error}"
        ) from error
    return directory


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; FileNotFoundError or ContractError names the file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}; `llm2clip import` makes a tower directory"
        )
    body = read_json_value(path)
    if not isinstance(body, dict):
        raise ContractError(
            f"{path} contains a {type(body).__name__}, expected a JSON object"
        )
    return body


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Indented, keys sorted."""
    path.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def section(
    config: dict[str, Any], name: str, *, where: str = "config.json"
) -> dict[str, Any]:
    """An object inside a JSON object, {} if absent or null; ContractError for anything else."""
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise ContractError(f'{where}: "{name}" is {value!r}, expected an object')
    return value or {}


# from the source's own preprocessor_config.json
INHERITED = ("image_mean", "image_std", "resample", "max_num_patches")
# switches of the image processors of transformers; null is a processor's default
SWITCHES = (
    "do_resize",
    "do_center_crop",
    "do_pad",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
)


def own_preprocessor(directory: Path) -> dict[str, Any]:
    """Mean, standard deviation and resampling in a directory's preprocessor_config.json, or in the
    image processor of its processor_config.json; {} without one.

    Mean and deviation are those of values in 0 .. 1, also if the file has another
    ``rescale_factor`` than 1/255. Pixels that are not normalized (``do_normalize`` false: RADIO
    does that itself) have mean 0 and deviation 1."""
    file = directory / PREPROCESSOR_FILE
    if file.is_file():
        body = read_json(file)
    else:
        file = directory / PROCESSOR_FILE
        processor = read_json(file) if file.is_file() else {}
        body = section(processor, "image_processor", where=str(file))
    for name in SWITCHES:
        if not isinstance(body.get(name), (bool, type(None))):
            raise ContractError(
                f"{file}: {name} is {body[name]!r}, expected a boolean: true or false"
            )
    stated = {name: body[name] for name in INHERITED if body.get(name) is not None}
    resample = stated.get("resample", 0)
    if type(resample) is not int or not 0 <= resample <= 5:
        raise ContractError(
            f"{file}: resample is {resample!r}, expected the number of PIL's filter, such as 3 "
            "(bicubic)"
        )
    if body.get("do_normalize") is False:
        stated |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    for name in ("image_mean", "image_std"):
        if name in stated:
            check_channels(name, stated[name], file)
    largest = largest_value(body, file)
    if not math.isclose(largest, 1.0, rel_tol=1e-6):
        for name in ("image_mean", "image_std"):
            if name not in stated:
                raise ContractError(
                    f"{file}: the largest pixel is {largest:g} after rescaling, but there is no "
                    f"{name}; take the values of the model that the tower comes from"
                )
            stated[name] = [value / largest for value in stated[name]]
    return stated


def largest_value(preprocessor: Mapping[str, Any], where: Path) -> float:
    """What a preprocessor makes of the largest pixel, 255, before it normalizes: 1, unless its
    ``rescale_factor`` is another than 1/255, or ``do_rescale`` is false. ContractError for a factor
    that is not above 0."""
    if preprocessor.get("do_rescale") is False:
        return 255.0
    factor = preprocessor.get("rescale_factor")
    if factor is None:
        return 1.0
    is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    if not is_number or not 0 < factor < math.inf:
        raise ContractError(
            f"{where}: rescale_factor is {factor!r}, expected a number above 0, such as 1/255"
        )
    return 255 * factor


def check_channels(name: str, values: Any, where: Path) -> None:
    """Raise ContractError for a mean or a standard deviation of pixels that is not three numbers,
    one for each color, or for a deviation that is not above 0."""
    lowest = -math.inf
    above = ""
    if name == "image_std":
        lowest = 0.0
        above = " above 0"

    def is_usable(value: Any) -> bool:
        return isinstance(value, (int, float)) and lowest < value < math.inf

    is_triple = isinstance(values, list) and len(values) == 3
    if not is_triple or not all(map(is_usable, values)):
        advice = "take the values of the model that the tower comes from"
        raise ContractError(
            f"{where}: {name} is {values!r}, expected three numbers{above} (red, green, blue); "
            f"{advice}"
        )


# Whether a tower directory is what was written: the hashes of its weights.

REMEDY = (
    "the directory was modified or only partly copied; copy or export the tower again"
)


def has_card(directory: Path) -> bool:
    """Whether a directory is a tower directory of this package, not just a Hugging Face model."""
    return (directory / TowerCard.FILE).is_file()


def check_hash(directory: Path, file: str) -> None:
    """Compare the weights or the adapter of a directory that has a card with the hash in it;
    ContractError has both."""
    if not has_card(directory):
        return
    card = TowerCard.read(directory / TowerCard.FILE)
    expected = card.weights_sha256 if file == WEIGHTS_FILE else card.adapter_sha256
    if not (directory / file).is_file():
        raise FileNotFoundError(f"no {file} in {directory}; {REMEDY}")
    if (actual := sha256_weights(directory / file)) != expected:
        raise ContractError(
            f"{directory / file} has SHA-256 {actual}, but {card.FILE} records {expected!r}: "
            f"{REMEDY}"
        )


def check_card(directory: Path, *, adapter: bool = True) -> TowerCard:
    """The card of a tower directory, after comparing the files that it has hashes of.
    ``adapter`` False: LLaVA uses the tower alone, whose directory may lack the text adapter."""
    card = TowerCard.read(directory / TowerCard.FILE)
    check_hash(directory, WEIGHTS_FILE)
    if card.projection_dim and adapter:
        check_hash(directory, ADAPTER_FILE)
    return card


# The places that a card names: origin, teacher, its adapter and post-processing. A relative path in
# a card starts with ./ or ../, so it is never mistaken for a Hub id, and stays right when a folder
# with the tower and its teacher is moved.

# folder in a tower directory: the adapter of its teacher, if it is portable
TEACHER_ADAPTER = "teacher-adapter"
# as a card records what is inside its directory
INSIDE = (f"./{TEACHER_ADAPTER}", f"./{POST_FILE}")
TEACHER_PLACES = ("llm", "adapter", "post_file")  # fields of a TeacherIdentity


def is_local(path_or_id: str) -> bool:
    """Whether a place is a path of this machine, rather than a Hub id or the name of a model in a
    library."""
    if path_or_id.startswith(("/", "~", "./", "../")) or path_or_id in (".", ".."):
        return True
    return os.path.exists(path_or_id)


def recorded(card: TowerCard, folder: str | os.PathLike[str]) -> TowerCard:
    """The card as it is written into ``folder``: local paths made relative to it, absolute where
    only / is shared."""
    inside = Path(folder).expanduser().absolute()

    def relative(path_or_id: str) -> str:
        if not is_local(path_or_id):
            return path_or_id
        path = Path(path_or_id).expanduser().absolute()
        if os.path.commonpath([path, inside]) == path.anchor:
            return str(path)
        from_inside = os.path.relpath(path, inside)
        return from_inside if from_inside.startswith("..") else f"./{from_inside}"

    return _with_places(card, relative)


def located(card: TowerCard, folder: str | os.PathLike[str]) -> TowerCard:
    """The card that was read from ``folder``, its relative paths made absolute."""
    inside = Path(folder).expanduser().absolute()

    def absolute(path_or_id: str) -> str:
        if path_or_id.startswith(("./", "../")):
            return os.path.normpath(inside / path_or_id)
        return path_or_id

    return _with_places(card, absolute)


def published(card: TowerCard) -> TowerCard:
    """The card without local paths: only the name of a folder is left of the weights' and of those
    in ``training``, nothing of an adapter's or post-processing's that is not in the directory."""

    def is_private(path_or_id: str) -> bool:
        return is_local(path_or_id) and path_or_id not in INSIDE

    def name_of(path_or_id: str) -> str:
        if is_private(path_or_id):
            return Path(path_or_id).expanduser().absolute().name
        return path_or_id

    def named(value: Any) -> Any:
        if isinstance(value, str):
            return name_of(value)
        if isinstance(value, list):
            return [named(item) for item in value]
        if isinstance(value, dict):
            return {name: named(item) for name, item in value.items()}
        return value

    public = dataclasses.replace(
        _with_places(card, name_of), training=named(card.training)
    )
    for name in ("adapter", "post_file"):
        if is_private(str(card.teacher.get(name, ""))):
            del public.teacher[name]  # a copy of the card's
    return public


def _with_places(card: TowerCard, change: Callable[[str], str]) -> TowerCard:
    """The card with ``change`` applied to each place in it; "" stays."""
    teacher = dict(card.teacher)
    for name in TEACHER_PLACES:
        path_or_id = teacher.get(name)
        if path_or_id and isinstance(path_or_id, str):
            teacher[name] = change(path_or_id)
    origin = change(card.origin) if card.origin else ""
    return dataclasses.replace(card, origin=origin, teacher=teacher)


# Checkpoints of other libraries.

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
# older versions run code in spite of `weights_only=True` (CVE-2025-32434)
SAFE_TORCH = (2, 6)
# of a training checkpoint, in the reference's order
WRAPPERS = ("model", "module", "state_dict")
WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors, .pt, .pth or .bin file by name, without wrappers and
    ``module.`` prefixes. Raises ContractError if the file is incomplete, contains code or anything
    but tensors, or has an unknown suffix."""
    from torch import Tensor

    if path.exists() and not path.is_file():  # opening a pipe would block
        raise ContractError(f"{path} is a folder, a pipe or a device, not a file")
    if path.suffix == ".safetensors":
        state = load_tensors(path, fix="download it again")
    elif path.suffix in PICKLE_SUFFIXES:
        state = _read_pickle(path)
        if isinstance(state, dict):
            # it may be inside a training checkpoint such as {epoch, name, state_dict}
            wrapped = [name for name in WRAPPERS if isinstance(state.get(name), dict)]
            if wrapped:
                state = state[wrapped[0]]
        is_filled = isinstance(state, dict) and len(state) > 0
        if not is_filled or not all(isinstance(v, Tensor) for v in state.values()):
            raise ContractError(f"{path} does not contain a dict of tensors")
    else:
        raise ContractError(
            f"{path} is not a checkpoint; supported: .safetensors, {', '.join(PICKLE_SUFFIXES)}"
        )
    # of DistributedDataParallel and torch.compile
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def read_tensor(path: Path, name: str) -> Tensor | None:
    """One tensor of a checkpoint file, None if it has no such tensor; of a .safetensors file
    nothing else is read."""
    if path.suffix != ".safetensors":
        return read_tensors(path).get(name)
    if name not in read_header(path).entries:
        return None
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


SHARD = re.compile(r"(.+)-\d+-of-\d+(\.safetensors|\.bin)")


def refuse_shards_without_index(directory: Path) -> None:
    """Raise ContractError for weights in several files without the file that lists them, which
    libraries call missing weights."""
    if any((directory / name).is_file() for name in WEIGHT_FILES):
        return
    for path in sorted(directory.glob("*-of-*")):
        shard = SHARD.fullmatch(path.name)
        if shard is None:
            continue
        index = directory / f"{shard[1]}{shard[2]}.index.json"
        if not index.is_file():
            raise ContractError(
                f"{directory} has weights in shards ({path.name}), but no {index.name}, which says "
                "what is in which; copy it from where the weights come from"
            )


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a folder: one with a standard name, the shards of an index, or its only
    checkpoint."""
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            return [directory / name]
        if (index := directory / f"{name}.index.json").is_file():
            shards = section(read_json(index), "weight_map", where=str(index)).values()
            return sorted({directory / Path(shard).name for shard in shards})
    refuse_shards_without_index(directory)
    files = sorted(
        path for path in directory.iterdir() if path.suffix in WEIGHT_SUFFIXES
    )
    if not files:
        raise FileNotFoundError(
            f"no checkpoint in {directory}: no .safetensors, {', '.join(PICKLE_SUFFIXES)} file"
        )
    if len(files) > 1:
        raise ContractError(
            f"{directory} has several checkpoints; choose one of {', '.join(p.name for p in files)}"
        )
    return files


def check_weights(directory: Path) -> None:
    """Raise FileNotFoundError or ContractError for weights that are missing or cut short, as far as
    names, headers and the ends of archives tell: it takes no time."""
    for path in weight_files(directory):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, which the index of the weights names; "
                "copy it from where the weights come from"
            )
        if path.suffix == ".safetensors":
            read_header(path)
            continue
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"  # torch's before 1.6 are none
        is_cut = is_archive and not zipfile.is_zipfile(path)
        if is_cut or path.stat().st_size == 0:
            raise ContractError(
                f"{path} is not a complete torch checkpoint; download it again"
            )


def refused_pickle(path: Path, error: pickle.UnpicklingError) -> ContractError:
    """The error for a pickle that torch does not read, whose own reason explains how to run the
    file nevertheless."""
    name = re.search(r"(?:GLOBAL |<class ')([\w.]+)", str(error))
    reason = "contains other objects than tensors"
    if name:
        reason = f"would run or construct {name[1]}"
    advice = (
        "load it where you trust it, with the library that wrote it, and save it with "
        "save_pretrained(FOLDER)"
    )
    return ContractError(
        f"{path} {reason}; nothing in it was run. Use the weights as .safetensors: {advice}"
    )


def _read_pickle(path: Path) -> Any:
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_TORCH:
        why = (
            f"torch {torch.__version__} cannot read a pickle safely "
            "(CVE-2025-32434, fixed in 2.6)"
        )
        raise ContractError(f"{path}: {why}; import it in the training environment")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise refused_pickle(path, error) from error
    except (
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ContractError(
            f"{path} is not a complete torch checkpoint ({reason}); download it again"
        ) from error
