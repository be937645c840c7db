"""Open a vision tower, from a checkpoint or new, and say how its images are prepared. ``parts.py``
has its blocks and norms, ``resize.py`` other image sizes.

Every tower is a Hugging Face vision model: ``pixel_values`` (B, 3, S, S) in; ``last_hidden_state``,
``pooler_output`` and, with ``output_hidden_states=True``, ``hidden_states`` out. The states mean
the same in every family: blocks + 1 tensors (B, T, H), the first one the input of the first block,
the others the outputs of the blocks before any final norm; the class token, if there is one, comes
first.
"""

import functools
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.quiet import quiet_transformers
from llm2clip_plugin.vision.directory import (
    ADAPTER_FILE,
    INHERITED,
    PREPROCESSOR_FILE,
    WEIGHTS_FILE,
    check_hash,
    fetch_directory,
    own_preprocessor,
    read_tensor,
    read_tensors,
    refuse_shards_without_index,
    weight_files,
)
from llm2clip_plugin.vision.families import (
    Family,
    Tower,
    families,
    family_of,
    read_config,
)
from llm2clip_plugin.vision.resize import check_calls, check_size, resize_tower

TIMM_PREFIX = "timm:"


def load_tower(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    revision: str | None = None,
    title: str = "",
) -> Tower:
    """A vision model from a tower directory, a plain Hugging Face directory, a Hub id or
    ``timm:NAME``, in eval mode.

    ``dtype`` applies whatever the file's is: transformers 4 reads half precision as float32,
    transformers 5 does not. ``image_size``, in pixels, interpolates the positions once if it is not
    the source's own (see ``resize_tower``); the forward pass then rejects images of any other size.
    ``title``: what a note calls the source; "": its directory.
    Raises FileNotFoundError (no such source), ValueError (unknown family), ContractError (weights
    that don't match the config: names every missing, unexpected or misshapen tensor; a tower
    directory that differs from its card).
    """
    if str(source).startswith(TIMM_PREFIX):
        tower = timm_tower(str(source).removeprefix(TIMM_PREFIX)).to(dtype)
    else:
        directory = fetch_directory(source, revision=revision)
        tower = _load_directory(directory, dtype, title)
    check_calls(tower)
    if image_size is not None and image_size != tower.config.image_size:
        tower = resize_tower(tower, image_size)
    return tower


def pretrained_log_scale(source: str | os.PathLike[str]) -> float | None:
    """The natural logarithm of a ``load_tower`` source's logit scale; None if it has none."""
    if str(source).startswith(TIMM_PREFIX):
        return None
    directory = fetch_directory(source)
    if (directory / ADAPTER_FILE).is_file():
        files = [directory / ADAPTER_FILE]
    else:
        files = weight_files(directory)
    for file in files:
        scale = read_tensor(file, "logit_scale")
        if scale is not None:
            return float(scale)
    return None


def initial_log_scale(source: str | os.PathLike[str], tower: Tower) -> float:
    """``pretrained_log_scale``, else the family's, of which a note is printed: vision-only folders
    have none, though the authors' code reads one (near 100) from OpenAI's and EVA02's."""
    log_scale = pretrained_log_scale(source)
    if log_scale is not None:
        return log_scale
    family = family_of(tower)
    print_once(
        f"note: {source} has no logit scale; training starts at {family.scale:.4g}, the default of "
        f"the family {family.name!r}; --dual.logit-scale-init sets its natural logarithm"
    )
    return math.log(family.scale)


def _load_directory(directory: Path, dtype: torch.dtype, title: str) -> Tower:
    """The tower in a directory, with every tensor of its file used and none missing."""
    family, _ = read_config(directory)
    refuse_shards_without_index(directory)
    if not any(directory.glob("model*.safetensors")):
        for path in sorted(directory.glob("pytorch_model*.bin")):
            # refuses a pickle that runs code, or is not safe to read
            read_tensors(path)
    check_hash(directory, WEIGHTS_FILE)
    from_pretrained = family.vision_class().from_pretrained
    read = functools.partial(
        from_pretrained, directory, torch_dtype=dtype, output_loading_info=True
    )
    with (
        errors_about(f"the tower in {directory}", fix="copy or export it again"),
        quiet_transformers(),
    ):
        try:
            tower, info = read()
        except RuntimeError:
            # misshapen tensors, which transformers lists only with ignore_mismatched_sizes
            # not at once: under ZeRO-3 all parameters are empty
            tower, info = read(ignore_mismatched_sizes=True)
    _check_loading(directory, family, info)
    tower.own_preprocessor = own_preprocessor(directory)
    note_default_normalization(directory, tower, family, title)
    return tower


def _check_loading(directory: Path, family: Family, info: dict[str, Any]) -> None:
    """ContractError for a tensor of the tower that is missing, not expected or has another shape;
    ``info``: transformers' ``output_loading_info``."""
    unexpected: list[str] = []
    for name in sorted(info["unexpected_keys"]):
        # old files on the Hub contain position_ids: a counter, not a weight
        is_counter = name.endswith("embeddings.position_ids")
        if not is_counter and not name.startswith(family.not_tower):
            unexpected.append(name)
    misshapen: dict[str, str] = {}
    for name, actual, expected in info["mismatched_keys"]:
        misshapen[name] = f"{name} is {tuple(actual)}, expected {tuple(expected)}"
    missing = sorted(set(info["missing_keys"]) - set(misshapen))
    if missing or unexpected or misshapen:
        shapes = [misshapen[name] for name in sorted(misshapen)]
        raise ContractError(
            f"the weights in {directory} do not match its config.json: missing {missing}, "
            f"unexpected {unexpected}, misshapen {shapes}"
        )


@functools.lru_cache
def print_once(text: str) -> None:
    """On stderr, by rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def note_default_normalization(
    directory: Path, tower: Tower, family: Family, title: str
) -> None:
    """Print a note if neither the tower's own file nor its config.json says how pixels are
    normalized. ``title``: what it calls the tower; "": its directory."""
    stated = {**tower.config.to_dict(), **tower.own_preprocessor}
    missing = []
    taken = []
    if not stated.get("image_mean"):
        missing.append("image_mean")
        taken.append(f"mean {list(family.mean)}")
    if not stated.get("image_std"):
        missing.append("image_std")
        taken.append(f"standard deviation {list(family.std)}")
    if not missing:
        return
    absent = " and ".join(missing)
    if len(missing) == 2 and not (directory / PREPROCESSOR_FILE).is_file():
        absent = PREPROCESSOR_FILE
    print_once(
        f"note: {title or directory} has no {absent}; pixels get the {' and '.join(taken)} of the "
        f"family {family.name!r}"
    )


def preprocessor_config(
    source: Tower | str | os.PathLike[str], *, square: bool = False
) -> dict[str, Any]:
    """preprocessor_config.json for a tower or a tower directory.

    Mean, standard deviation and resampling are those of the source's own file or configuration,
    else the family's; the crop is the tower's image size, because SigLIP's and DINOv2's own files
    have no ``crop_size`` or another size. ``square``: images are cropped whatever the family, as
    LLaVA needs them.
    """
    if isinstance(source, nn.Module):
        tower: Tower = source
        family = family_of(tower)
        config = tower.config
        stated = getattr(tower, "own_preprocessor", {})
    else:
        directory = fetch_directory(source)
        family, config = read_config(directory)
        stated = own_preprocessor(directory)
    inherited: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name in INHERITED and value:
            inherited[name] = value
    stated = {**inherited, **stated}
    size = config.image_size
    processor: dict[str, Any] = {
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "crop_size": {"height": size, "width": size},
        "image_mean": list(stated.get("image_mean", family.mean)),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(stated.get("image_std", family.std)),
        "resample": stated.get("resample", family.resample),
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
    if getattr(config, "keeps_aspect", False) and not square:
        # which ignores the square
        processor["image_processor_type"] = "Siglip2ImageProcessor"
        processor["patch_size"] = config.patch_size
        processor["max_num_patches"] = (size // config.patch_size) ** 2
    return processor


# A tower of a known architecture without a checkpoint: on torch's meta device for plans, or with
# random weights.


def new_tower(
    source: str, *, image_size: int | None = None, device: str = "cpu"
) -> Tower:
    """A tower with the random weights that its library gives it, from torch's generator, in
    float32; none on "meta".

    ``source``: a tower directory (its config.json), one of the families' ``shapes``, or
    ``timm:NAME``. Raises ValueError for anything else, FileNotFoundError for a directory without
    config.json.
    """
    if source.startswith(TIMM_PREFIX):
        # not built on the meta device: timm reads the rates of stochastic depth from tensors while
        # it builds a model
        tower = timm_tower(source.removeprefix(TIMM_PREFIX), pretrained=False)
        if image_size and image_size != tower.config.image_size:
            tower = resize_tower(tower, image_size)
        return tower.to(device)
    shapes: dict[str, tuple[Family, dict[str, Any]]] = {}
    for family in families().values():
        for name, shape in family.shapes.items():
            shapes[name] = (family, shape)
    directory = Path(source).expanduser()
    if directory.is_dir():
        family, config = read_config(directory)
    elif source in shapes:
        family, shape = shapes[source]
        config = family.vision_class().config_class(**shape)
    else:
        raise ValueError(
            f"{source!r} is no tower directory or architecture; known: {', '.join(shapes)}, "
            "timm:NAME"
        )
    if image_size:
        check_size(config, image_size)
        config.image_size = image_size
    with torch.device(device):
        return family.vision_class()(config)


# Any timm vision transformer as a tower: ``load_tower("timm:vit_base_patch16_224")``. Needs timm
# 1.0 or newer.


def timm_tower(
    name: str, *, pretrained: bool = True, arguments: Mapping[str, Any] | None = None
) -> Tower:
    """A tower from a timm name, at its native size; ValueError unless it is a plain vision
    transformer."""
    timm_class = families()["timm"].vision_class()
    tower = timm_class.from_timm(name, pretrained=pretrained, arguments=arguments or {})
    return tower.eval()
