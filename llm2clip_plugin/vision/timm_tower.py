"""Any timm vision transformer as a tower: ``load_tower("timm:vit_base_patch16_224")``. Needs timm 1.0 or newer.

Prefix tokens (class, registers) differ between models, so the states contain only the patches; pooler_output is the
model's own pooling. Shapes: B images, N patches, P prefix tokens, H width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llm2clip_plugin.outside.values import MAX_SIDE, MAX_WIDTH, check_range, check_whole
from llm2clip_plugin.vision.family import RESAMPLE

# arguments of timm's models that a configuration may set; others could name files, code or pretrained weights
SIZES = ("patch_size", "embed_dim", "depth", "num_heads", "reg_tokens", "attn_pool_num_heads")
RATIOS = ("mlp_ratio", "attn_pool_mlp_ratio", "init_values")
SWITCHES = ("class_token", "no_embed_class", "qkv_bias", "pre_norm", "final_norm", "fc_norm")
OTHERS = ("global_pool", "ref_feat_shape")


class TimmConfig(PretrainedConfig):
    """The name of a timm model, and what the package needs to know about it.

    ``timm_args`` override the arguments of the named model (see ``check_arguments``).
    """

    model_type = "llm2clip_timm"

    def __init__(
        self,
        timm_name: str = "vit_base_patch16_224",
        image_size: int = 224,  # pixels
        patch_size: int = 16,  # pixels
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        prefix_tokens: int = 1,  # before the patches; not in the states
        position_class_rows: int = 1,  # rows of the position table before those of the patches
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        resample: int | None = None,  # PIL's filter
        timm_args: dict[str, Any] | None = None,
        **kwargs,  # Hugging Face's own fields of config.json
    ) -> None:
        self.timm_name = timm_name
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.prefix_tokens = prefix_tokens
        self.position_class_rows = position_class_rows
        self.image_mean = image_mean
        self.image_std = image_std
        self.resample = resample
        self.timm_args = check_arguments(timm_args or {})
        super().__init__(**kwargs)


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


class TimmTower(PreTrainedModel):
    """A timm vision transformer with the states and outputs of a tower."""

    config_class = TimmConfig
    main_input_name = "pixel_values"
    base_model_prefix = "timm"
    supports_gradient_checkpointing = True

    def __init__(self, config: TimmConfig) -> None:
        super().__init__(config)
        self.model: Any = make_timm(config.timm_name, config.image_size, pretrained=False, arguments=config.timm_args)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        directory: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
    ) -> TimmTower | tuple[TimmTower, dict]:
        """The tower in a directory. Hugging Face's method builds models without memory, which leaves timm's rotary
        tables empty, because no file contains them. Tensors of another shape raise RuntimeError, or, with
        ``ignore_mismatched_sizes``, keep their initial values and are listed in the loading info."""
        from safetensors.torch import load_file

        tower: Any = cls(TimmConfig.from_pretrained(directory))
        state, own = load_file(Path(directory) / "model.safetensors"), tower.state_dict()
        wrong = [(k, v.shape, own[k].shape) for k, v in state.items() if k in own and v.shape != own[k].shape]
        for name, *_ in wrong if ignore_mismatched_sizes else ():
            del state[name]
        left = tower.load_state_dict(state, strict=False)
        info = {"missing_keys": left.missing_keys, "unexpected_keys": left.unexpected_keys, "mismatched_keys": wrong}
        tower = tower.to(torch_dtype).eval()
        return (tower, info) if output_loading_info else tower

    def _init_weights(self, module: nn.Module) -> None:
        """timm initializes its own weights."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Recompute each block in the backward pass, with timm's own (non-reentrant) checkpointing."""
        self.model.set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Save all activations."""
        self.model.set_grad_checkpointing(False)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> BaseModelOutputWithPooling | tuple:
        """(B, 3, S, S) -> last_hidden_state (B, N, H) normed, pooler_output (B, H), hidden_states on request."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[Tensor] = []
        handles = []
        if output_hidden_states:
            blocks = self.model.blocks
            handles = [block.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for block in blocks]
            handles.append(blocks[-1].register_forward_hook(lambda _, __, output: states.append(output)))
        try:
            tokens = self.model.forward_features(pixel_values)
        finally:
            for handle in handles:
                handle.remove()
        skip = self.config.prefix_tokens
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens[:, skip:],
            pooler_output=self.model.forward_head(tokens, pre_logits=True),
            hidden_states=tuple(state[:, skip:] for state in states) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()


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
