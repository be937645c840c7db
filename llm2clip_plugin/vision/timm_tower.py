"""Any timm vision transformer as a Hugging Face vision model whose states are its patches. Needs timm 1.0 or newer.

Prefix tokens (class, registers) differ between models, so the states contain only the patches; pooler_output is the
model's own pooling. This file stands alone, as it is saved with a LLaVA that is exported to Hugging Face.

Shapes: B images, N patches, P prefix tokens, H width, S image size in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

# arguments of timm's models that a configuration may set; others could name files, code or pretrained weights
ARGUMENTS = (
    *("patch_size", "embed_dim", "depth", "num_heads", "reg_tokens", "mlp_ratio", "init_values", "ref_feat_shape"),
    *("class_token", "no_embed_class", "qkv_bias", "pre_norm", "final_norm", "fc_norm"),
    *("global_pool", "attn_pool_num_heads", "attn_pool_mlp_ratio"),
)


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
    settings: dict[str, Any] = dict(arguments or {}) | ({} if image_size is None else {"img_size": image_size})
    if unknown := sorted(set(settings) - {*ARGUMENTS, "img_size"}):
        raise ValueError(f"timm_args: {unknown[0]!r} cannot be set here; known: {', '.join(ARGUMENTS)}")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **settings)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"timm {timm.__version__} cannot build {name!r} with {settings}: {error}") from error


class TimmVitConfig(PretrainedConfig):
    """The name of a timm model, and what is needed to know about it; ``timm_args`` override its arguments."""

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
        self.timm_args = dict(timm_args or {})
        super().__init__(**kwargs)


class TimmTower(PreTrainedModel):
    """A timm vision transformer with the states and outputs of a Hugging Face vision model."""

    config_class = TimmVitConfig
    main_input_name = "pixel_values"
    base_model_prefix = "timm"
    supports_gradient_checkpointing = True

    def __init__(self, config: TimmVitConfig) -> None:
        super().__init__(config)
        self.model: Any = make_timm(config.timm_name, config.image_size, pretrained=False, arguments=config.timm_args)
        self.is_built_without_memory = any(parameter.is_meta for parameter in self.model.parameters())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """timm initializes its own weights. Its tables of rotary positions are in no file, and transformers builds
        models without memory: they are computed once more. Raises ValueError if timm is too old for that."""
        if not module._non_persistent_buffers_set or any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            return
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # pyright: ignore[reportCallIssue]
        elif self.is_built_without_memory:
            raise ValueError(f"this timm cannot compute the tables of its {type(module).__name__}; pip install -U timm")

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Recompute each block in the backward pass, with timm's own (non-reentrant) checkpointing."""
        self.model.set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Save all activations."""
        self.model.set_grad_checkpointing(False)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,  # of the language model's, which transformers 5 passes to the tower too
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
            tokens = self.model.forward_features(pixel_values.to(self.dtype))
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


AutoConfig.register(TimmVitConfig.model_type, TimmVitConfig, exist_ok=True)
AutoModel.register(TimmVitConfig, TimmTower, exist_ok=True)
