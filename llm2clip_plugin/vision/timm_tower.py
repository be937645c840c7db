"""Any timm vision transformer as a tower: ``load_tower("timm:vit_base_patch16_224")``. Needs timm 1.0 or newer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm2clip_plugin.files import MAX_SIDE, MAX_WIDTH, check_range, check_whole
from llm2clip_plugin.vision.family import RESAMPLE
from llm2clip_plugin.vision.standalone.timm_vit import OTHERS, RATIOS, SIZES, SWITCHES, TimmVit, TimmVitConfig


def check_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a timm model from a file; ValueError for one that is not allowed, or out of bounds."""
    for name, value in arguments.items():
        if name in SIZES:
            check_whole(value, 0 if name == "reg_tokens" else 1, MAX_WIDTH, name=name, where="timm_args")
        elif name in RATIOS:
            check_range(value, 0, 64, name=name, where="timm_args")
        elif name in SWITCHES:
            if value not in (None, True, False):
                raise ValueError(f"timm_args: {name} is {value!r}, expected true, false or null")
        elif name == "global_pool":
            if value not in ("", "avg", "token", "map", "max", "avgmax"):
                raise ValueError(f"timm_args: {name} is {value!r}, expected avg, token, map, max, avgmax or nothing")
        elif name == "ref_feat_shape":
            for side in value if isinstance(value, (list, tuple)) else [value]:
                check_whole(side, 1, MAX_SIDE, name=name, where="timm_args")
        else:
            known = ", ".join((*SIZES, *RATIOS, *SWITCHES, *OTHERS))
            raise ValueError(f"timm_args: {name!r} cannot be set here; known: {known}")
    return dict(arguments)


def timm_module():
    """timm itself; ValueError if it is missing or too old."""
    try:
        import timm
    except ImportError as error:
        raise ValueError("this tower is a timm model; install timm: pip install 'timm>=1.0'") from error
    if int(timm.__version__.split(".")[0]) < 1:
        raise ValueError(f"this tower requires timm 1.0 or newer; {timm.__version__} is installed")
    return timm


def make_timm(
    name: str, image_size: int | None, *, pretrained: bool, arguments: Mapping[str, Any] | None = None
) -> Any:
    """The timm model without its classifier; ValueError for an unknown name lists similar ones."""
    timm = timm_module()
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8])
        raise ValueError(f"unknown timm model {name!r} (timm {timm.__version__}); similar names: {near}")
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **size, **(arguments or {}))
    except (TypeError, AssertionError) as error:
        raise ValueError(
            f"timm {timm.__version__} cannot build {name!r} with {dict(arguments or {})}: {error}"
        ) from error


class TimmConfig(TimmVitConfig):
    """A configuration from a file, whose ``timm_args`` are checked (see ``check_arguments``)."""

    def __init__(self, timm_args: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(timm_args=check_arguments(timm_args or {}), **kwargs)


class TimmTower(TimmVit):
    """A timm vision transformer with the states and outputs of a tower."""

    config_class = TimmConfig

    @staticmethod
    def build(config: TimmVitConfig) -> Any:
        """timm's model, as ``make_timm``."""
        return make_timm(config.timm_name, config.image_size, pretrained=False, arguments=config.timm_args)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        directory: str | os.PathLike[str] | None,
        *,
        torch_dtype: torch.dtype | None = None,
        config: TimmConfig | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
    ) -> TimmTower | tuple[TimmTower, dict]:
        """The tower in a directory, or of ``config`` and ``state_dict``. Hugging Face's method builds models without
        memory, which leaves timm's rotary tables empty where timm is too old, because no file contains them. Tensors
        of another shape raise RuntimeError, or, with ``ignore_mismatched_sizes``, keep their initial values and are
        listed in the loading info."""
        from safetensors.torch import load_file

        tower: Any = cls(TimmConfig.from_pretrained(directory or ".") if config is None else config)
        state = load_file(Path(directory or ".") / "model.safetensors") if state_dict is None else dict(state_dict)
        own = tower.state_dict()
        wrong = [(k, v.shape, own[k].shape) for k, v in state.items() if k in own and v.shape != own[k].shape]
        for name, *_ in wrong if ignore_mismatched_sizes else ():
            del state[name]
        left = tower.load_state_dict(state, strict=False)
        info = {"missing_keys": left.missing_keys, "unexpected_keys": left.unexpected_keys, "mismatched_keys": wrong}
        tower = tower.to(torch_dtype).eval()
        return (tower, info) if output_loading_info else tower


def timm_tower(
    name: str, *, pretrained: bool = True, image_size: int | None = None, arguments: Mapping[str, Any] | None = None
) -> Any:
    """A tower from a timm name, at its native size unless ``image_size`` is given, with timm's pretrained weights.

    ``arguments`` override those of the named model.
    Raises ValueError unless the model is a plain vision transformer: one list of blocks, square patches, a square grid.
    """
    model = make_timm(name, image_size, pretrained=pretrained, arguments=check_arguments(arguments or {}))
    tower = TimmTower(timm_config(model, name, arguments or {}))
    tower.model.load_state_dict(model.state_dict())
    return tower.eval()


def timm_config(model: Any, name: str, arguments: Mapping[str, Any]) -> TimmConfig:
    """The configuration of a timm model; ValueError unless it is a plain vision transformer."""
    parts = dict(model.named_children())
    if not {"patch_embed", "blocks"} <= set(parts) or not hasattr(model, "num_prefix_tokens"):
        raise ValueError(f"timm:{name} is not a plain vision transformer with patch_embed, blocks, num_prefix_tokens")
    (height, width), (rows, columns) = model.patch_embed.patch_size, model.patch_embed.grid_size
    if height != width or rows != columns:
        raise ValueError(
            f"timm:{name} has patches of {height} x {width} and a grid of {rows} x {columns}; both must be square"
        )
    table = model.pos_embed.shape[1] - rows * columns if isinstance(model.pos_embed, nn.Parameter) else 0
    return TimmConfig(
        timm_name=name,
        image_size=rows * height,
        patch_size=height,
        hidden_size=model.num_features,
        num_hidden_layers=len(model.blocks),
        prefix_tokens=model.num_prefix_tokens,
        position_class_rows=table,
        image_mean=list(model.pretrained_cfg["mean"]),
        image_std=list(model.pretrained_cfg["std"]),
        resample=RESAMPLE.get(model.pretrained_cfg["interpolation"]),
        timm_args=dict(arguments),
    )
