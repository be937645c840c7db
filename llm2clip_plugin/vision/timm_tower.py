"""Any timm vision transformer as a tower: ``load_tower("timm:vit_base_patch16_224")``. Needs timm 1.0 or newer."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from llm2clip_plugin.vision.family import RESAMPLE
from llm2clip_plugin.vision.standalone.timm_vit import TimmVit, TimmVitConfig, allowed


def make_timm(
    name: str, image_size: int | None, *, pretrained: bool, arguments: Mapping[str, Any] | None = None
) -> Any:
    """The timm model without its classifier; ValueError for an unknown name, with similar ones, or argument."""
    try:
        import timm
    except ImportError as error:
        raise ValueError("this tower is a timm model; install timm: pip install 'timm>=1.0'") from error
    if timm.__version__.startswith("0."):
        raise ValueError(f"this tower requires timm 1.0 or newer; {timm.__version__} is installed")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8])
        raise ValueError(f"unknown timm model {name!r} (timm {timm.__version__}); similar names: {near}")
    settings = allowed(arguments or {})
    if image_size is not None:
        settings["img_size"] = image_size
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **settings)
    except (TypeError, AssertionError) as error:
        raise ValueError(
            f"timm {timm.__version__} cannot build {name!r} with {dict(arguments or {})}: {error}"
        ) from error


class TimmTower(TimmVit):
    """A timm vision transformer with the states and outputs of a tower."""

    @staticmethod
    def build(config: TimmVitConfig) -> Any:
        """timm's model, as ``make_timm``."""
        return make_timm(config.timm_name, config.image_size, pretrained=False, arguments=config.timm_args)


def timm_tower(
    name: str, *, pretrained: bool = True, image_size: int | None = None, arguments: Mapping[str, Any] | None = None
) -> Any:
    """A tower from a timm name, at its native size unless ``image_size`` is given, with timm's pretrained weights.

    ``arguments`` override those of the named model.
    Raises ValueError unless the model is a plain vision transformer: one list of blocks, square patches, a square grid.
    """
    model = make_timm(name, image_size, pretrained=pretrained, arguments=arguments)
    tower = TimmTower(timm_config(model, name, arguments or {}))
    tower.model.load_state_dict(model.state_dict())
    return tower.eval()


def timm_config(model: Any, name: str, arguments: Mapping[str, Any]) -> TimmVitConfig:
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
    return TimmVitConfig(
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
