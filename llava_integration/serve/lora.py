"""LoRA weights merged into the tensors that they belong to, when these are read."""

import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_integration.compat.runner import adapters_stay_fp32
from llava_integration.serve.tensors import FIX, LazyTensor, LazyTensors, open_file
from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.outside.values import errors_about
from llm2clip_plugin.vision.directory import read_json

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight$")
# settings of peft under which a merge is another sum, or more than one scale
PLAIN = {"use_dora": False, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}


def merged(tensors: LazyTensors, directory: Path, files: ExitStack) -> LazyTensors:
    """``tensors`` with the adapter of ``directory`` merged into them.

    Computed in fp16, as by LLaVA's loader with this environment's peft. Raises ContractError for an adapter
    of another kind, a half that is missing, or a module that the model doesn't have.
    """
    config = read_json(directory / CONFIG)
    scale = _scale(config, directory / CONFIG)
    path = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no {' or '.join(WEIGHTS)} in {directory}; {FIX}")
    halves: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in open_file(path, files).items():
        match = NAME.match(name)
        target = f"{match['module']}.weight" if match else name
        if match is None or target not in tensors:
            raise ContractError(
                f"{path}: {name} belongs to no weight of the base model; is --model-base the right one?"
            )
        halves.setdefault(target, {})[match["half"]] = tensor
    _refuse_missing(halves, tensors, config.get("target_modules"), path)
    out = dict(tensors)
    for name, pair in halves.items():
        if len(pair) != 2:
            raise ContractError(f"{path}: {name} has one half of its LoRA, expected lora_A and lora_B; {FIX}")
        shape = (pair["B"].shape[0], pair["A"].shape[-1])
        if shape != tensors[name].shape:
            raise ContractError(
                f"{path}: the LoRA of {name} has shape {shape}, the base model's weight {tensors[name].shape}; "
                "check --model-base"
            )
        out[name] = LazyTensor(
            shape=shape,
            read=lambda weight=tensors[name], pair=pair: _sum(weight.read(), pair["A"].read(), pair["B"].read(), scale),
            where=str(path),
        )
    return out


def _refuse_missing(found: Iterable[str], tensors: LazyTensors, targets: Any, path: Path) -> None:
    """``targets``: names of the modules that have a LoRA in every block."""
    kinds = {str(target).split(".")[-1] for target in targets} if isinstance(targets, list) else set()
    wanted = {name for name in tensors if name.startswith("model.layers.") and name.split(".")[-2] in kinds}
    wanted = {name for name in wanted if name.endswith(".weight")}
    if lost := sorted(wanted - {*found}):
        raise ContractError(
            f"{path}: {len(lost)} of {len(wanted)} target_modules of {CONFIG} have no LoRA, such as {lost[0]}; {FIX}"
        )


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    if adapters_stay_fp32():
        return weight.half().add_((b.float() @ a.float()) * scale)
    delta = (b.half().float() @ a.half().float()) * scale
    return weight.half() + delta.half()


def _scale(config: dict[str, Any], where: Path) -> float:
    if config.get("peft_type") != "LORA":
        raise ContractError(f"{where} is not a LoRA's configuration; {FIX}")
    for name, plain in PLAIN.items():
        if (value := config.get(name)) and value != plain:
            raise ContractError(f"{where}: {name} is {value!r}, which LLaVA's training does not set")
    if config.get("bias", "none") != "none":
        raise ContractError(f"{where}: bias is {config['bias']!r}; LLaVA's loader merges LoRA without biases")
    with errors_about(where, fix=FIX):
        rank, alpha = config["r"], config["lora_alpha"]
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)
