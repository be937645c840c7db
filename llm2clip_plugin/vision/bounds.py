"""Bounds of what a tower directory states, checked before a model of these sizes is allocated."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2clip_plugin.outside.safetensors_header import Header, read_header
from llm2clip_plugin.outside.values import MAX_LAYERS, MAX_SIDE, MAX_WIDTH, ContractError, check_range, check_whole
from llm2clip_plugin.vision.family import Family

CONFIG_LIMITS = {  # field of config.json -> largest value; the smallest is 1
    "hidden_size": MAX_WIDTH,
    "intermediate_size": 8 * MAX_WIDTH,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_WIDTH,
    "image_size": MAX_SIDE,
    "patch_size": MAX_SIDE,
    "num_channels": MAX_WIDTH,
    "projection_dim": MAX_WIDTH,
    "rope_pretrained_grid": MAX_SIDE,
    "num_register_tokens": MAX_WIDTH,
    "num_registers": MAX_WIDTH,
    "num_cls_tokens": MAX_WIDTH,
    "max_img_size": MAX_SIDE,
}
MAY_BE_ZERO = ("projection_dim", "num_register_tokens", "num_registers")
RESAMPLE = 5  # PIL's filters are 0 to 5


def check_config(config: Mapping[str, Any], *, where: str) -> None:
    """Compare the sizes in a parsed config.json, its ``vision_config`` included, with what towers can have.

    Raises ContractError with the file, the field and the value.
    """
    nested = config.get("vision_config")
    if isinstance(nested, Mapping):
        check_config(nested, where=f"{where}: vision_config")
    for name, high in CONFIG_LIMITS.items():
        if config.get(name) is not None:
            check_whole(config[name], 0 if name in MAY_BE_ZERO else 1, high, name=name, where=where)
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if width and heads and width % heads:
        raise ContractError(f"{where}: hidden_size {width} is not divisible by num_attention_heads {heads}")
    if (config.get("patch_size") or 1) > (config.get("image_size") or MAX_SIDE):
        raise ContractError(f"{where}: patch_size {config['patch_size']} exceeds image_size {config['image_size']}")


def check_weights(directory: Path, family: Family, config: Mapping[str, Any]) -> None:
    """Compare the headers of a directory's safetensors files with its config.json, before the model is built.

    Raises ContractError, naming the file, for a damaged header, another number of blocks than the configuration's, or
    a file that is too small for its widths. Files of other formats are not read.
    """
    files = sorted(directory.glob("model*.safetensors"))
    headers: dict[Path, Header] = {path: read_header(path) for path in files}
    if not headers:
        return
    names = [name for header in headers.values() for name in header.entries]
    block = re.compile(rf"(?:^|\.){re.escape(family.blocks)}\.(\d+)\.")
    tower_names = [name for name in names if not name.startswith(family.not_tower)]
    numbers = {int(match[1]) for name in tower_names if (match := block.search(name))}
    nested = config.get("vision_config")
    config = nested if isinstance(nested, Mapping) else config
    layers, width = config.get("num_hidden_layers"), config.get("hidden_size")  # absent: the library's default
    if numbers and layers is not None and max(numbers) + 1 != layers:
        raise ContractError(
            f"{directory / 'config.json'}: num_hidden_layers is {layers}, but the weights in {directory} have "
            f"{max(numbers) + 1} blocks"
        )
    total = sum(path.stat().st_size for path in files)
    if (layers or 1) * (width or 1) * max(width or 1, config.get("intermediate_size") or 1) > total:  # bytes of weights
        raise ContractError(
            f"{directory / 'config.json'}: {layers} blocks of width {width} do not fit into the {total} bytes of "
            f"{', '.join(path.name for path in files)}"
        )


def check_preprocessor(body: Mapping[str, Any], *, where: str) -> None:
    """Compare a parsed preprocessor_config.json with what an image processor can use.

    Raises ContractError with the file, the field and the value.
    """
    for name, low in (("image_mean", -10.0), ("image_std", 1e-3)):
        values = body.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != 3:
            raise ContractError(f"{where}: {name} is {values!r}, expected a list of 3 numbers")
        for value in values:
            check_range(value, low, 10.0, name=name, where=where)
    if body.get("resample") is not None:
        check_whole(body["resample"], 0, RESAMPLE, name="resample", where=where)
    if body.get("rescale_factor") is not None:
        check_range(body["rescale_factor"], 1e-6, 1.0, name="rescale_factor", where=where)
    for name in ("size", "crop_size"):
        sizes = body.get(name)
        if sizes is None:
            continue
        for key, value in sizes.items() if isinstance(sizes, Mapping) else [("", sizes)]:
            check_whole(value, 1, MAX_SIDE, name=f"{name}.{key}".rstrip("."), where=where)
    for name, value in body.items():
        if name.startswith("do_") and value is not None and not isinstance(value, bool):
            raise ContractError(f"{where}: {name} is {value!r}, expected true or false")
