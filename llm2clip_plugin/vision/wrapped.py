"""Towers of other libraries in another form: DINOv2, DINOv3, TIPSv2 and RADIO without registers,
AIMv2 and InternViT that pool, OpenVision, and any timm vision transformer (timm 1.0 or newer),
whose states are its patches.

``forward`` ignores other arguments: transformers 5 passes the language model's, such as
``use_cache``, to the tower. This file stands alone, as it is saved with a LLaVA that is exported to
Hugging Face. transformers 4 lacks some of the bases. Shapes: B images, T tokens, N patches, H
width, S image size in pixels.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling


def remove_tokens(output: Any, start: int, stop: int) -> Any:
    """A model's output whose states (B, T, H) lack the tokens ``start`` to ``stop - 1``, such as
    registers."""

    def kept(state: Any) -> Any:
        # a GPU would wait for the copy of an index
        return torch.cat((state[:, :start], state[:, stop:]), dim=1)

    output.last_hidden_state = kept(output.last_hidden_state)
    if output.hidden_states is not None:
        output.hidden_states = tuple(kept(state) for state in output.hidden_states)
    return output


class Changed:
    """A tower whose outputs are changed, by its ``change``."""

    def forward(
        self: Any,
        pixel_values: Any,
        output_hidden_states: Any = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """See the base. transformers 5 may ask for one state by its number, which is answered with
        all."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = super().forward(  # type: ignore[misc]
            pixel_values.to(self.dtype), output_hidden_states=bool(output_hidden_states)
        )
        output = self.change(states)
        return output if return_dict is not False else output.to_tuple()


class WithoutRegisters(Changed):
    """A tower whose states leave out the registers between class token and patches."""

    def change(self: Any, output: Any) -> Any:
        return remove_tokens(output, 1, 1 + self.config.num_register_tokens)


class EvalWhileFrozen:
    """A tower that stays in eval mode as long as none of its parameters is trained, whatever
    ``train()`` says. In training mode DINOv3 draws a scale of its rotary positions at every call.
    """

    def train(self: Any, mode: bool = True) -> Any:
        """See torch.nn.Module."""
        mode = mode and any(parameter.requires_grad for parameter in self.parameters())
        return nn.Module.train(self, mode)


def register(config: Any, model: Any, stock: str) -> None:
    """Let AutoModel open a tower; the names of tensors in its files are the Hub's, as those of
    ``stock``."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    try:
        from transformers import conversion_mapping as mapping
    except ImportError:  # transformers 4, whose modules have the Hub's names
        return
    renamed = mapping.get_checkpoint_conversion_mapping(stock) or []
    mapping.register_checkpoint_conversion_mapping(
        config.model_type, renamed, overwrite=True
    )


class OpenVisionConfig(CLIPVisionConfig):
    """CLIP's, under a type of its own."""

    model_type = "llm2clip_openvision"


class OpenVisionModel(Changed, CLIPVisionModel):
    """CLIP's tower without the norm before the blocks; the mean of the patches, normed, is
    pooled."""

    config_class = OpenVisionConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._core.pre_layrnorm = nn.Identity()

    @property
    def _core(self) -> Any:
        return getattr(self, "vision_model", self)  # in transformers 4

    def change(self, output: Any) -> Any:
        mean_BH = output.last_hidden_state[:, 1:].mean(dim=1)
        output.pooler_output = self._core.post_layernorm(mean_BH)
        return output


register(OpenVisionConfig, OpenVisionModel, "CLIPVisionModel")

if hasattr(transformers, "Aimv2VisionModel"):

    class Aimv2Tower(transformers.Aimv2VisionModel):
        """AIMv2 that reads the tower of an image-text model too, and pools without a head."""

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            """See PreTrainedModel; in the file of an image-text model the tower is below
            ``vision_model``."""
            return super().from_pretrained(
                *args, key_mapping={r"^vision_model\.": ""}, **kwargs
            )

        def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
            """See PreTrainedModel; without ``vision_model``, wherever the tower came from."""
            super().save_pretrained(*args, save_original_format=False, **kwargs)

        def forward(self, pixel_values: Any, **kwargs: Any) -> Any:
            """See Aimv2VisionModel; the pooled output of a tower without a head is the mean of its
            normed patches."""
            output: Any = super().forward(pixel_values, **kwargs)
            if output.pooler_output is None:
                output.pooler_output = output.last_hidden_state.mean(dim=1)
            return output


if int(transformers.__version__.split(".")[0]) < 5:

    class NoHead(nn.Module):
        """The pooling head of a SigLIP that has none."""

        def forward(self, states: Tensor) -> None:
            """No pooled output."""

    class SiglipVisionModel(transformers.SiglipVisionModel):
        """SigLIP that may lack the pooling head, as inside most vision-language models; before
        transformers 5 it always has one."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            core: Any = self.vision_model
            if not getattr(config, "vision_use_head", True):
                core.head = NoHead()


if hasattr(transformers, "DINOv3ViTModel"):

    class Dinov3TowerConfig(transformers.DINOv3ViTConfig):
        """DINOv3's, under a type of its own."""

        model_type = "llm2clip_dinov3"

    class Dinov3Tower(EvalWhileFrozen, WithoutRegisters, transformers.DINOv3ViTModel):
        """DINOv3 without the registers between class token and patches."""

        config_class = Dinov3TowerConfig

    register(Dinov3TowerConfig, Dinov3Tower, "dinov3_vit")

if hasattr(transformers, "Dinov2WithRegistersModel"):

    class Dinov2RegistersConfig(transformers.Dinov2WithRegistersConfig):
        """DINOv2's with registers, under a type of its own."""

        model_type = "llm2clip_dinov2_registers"

    class Dinov2RegistersTower(WithoutRegisters, transformers.Dinov2WithRegistersModel):
        """DINOv2 without the registers between class token and patches."""

        config_class = Dinov2RegistersConfig

    register(Dinov2RegistersConfig, Dinov2RegistersTower, "Dinov2WithRegistersModel")

if hasattr(transformers, "Tipsv2VisionModel"):

    class Tipsv2TowerConfig(transformers.Tipsv2VisionConfig):
        """TIPSv2's, under a type of its own."""

        model_type = "llm2clip_tipsv2"

    class Tipsv2Tower(WithoutRegisters, transformers.Tipsv2VisionModel):
        """TIPSv2 with the first class token alone: the second, which learned from synthetic
        captions, lies where DINOv2 has registers."""

        config_class = Tipsv2TowerConfig

    register(Tipsv2TowerConfig, Tipsv2Tower, "Tipsv2VisionModel")


def one_side(size: Any, name: str) -> int:
    """The side of a square, which transformers writes as a number or as a pair; ValueError for
    another shape."""
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1:
        raise ValueError(f"{name} is {tuple(size)}; only squares are supported")
    return sides.pop()


if hasattr(transformers, "InternVLVisionModel"):

    class InternvlTowerConfig(transformers.InternVLVisionConfig):
        """InternViT's, whose sizes are numbers of pixels, not pairs."""

        def __post_init__(self, **kwargs: Any) -> None:
            super().__post_init__(**kwargs)
            self.image_size = one_side(self.image_size, "image_size")
            self.patch_size = one_side(self.patch_size, "patch_size")

    class InternvlTower(Changed, transformers.InternVLVisionModel):
        """InternViT; the class token is pooled, as by OpenGVLab's own code."""

        config_class = InternvlTowerConfig

        def __init__(self, config: Any) -> None:
            sizes = {"image_size": config.image_size, "patch_size": config.patch_size}
            for name, side in sizes.items():
                setattr(config, name, (side, side))  # as the base reads them
            super().__init__(config)
            for name, side in sizes.items():
                setattr(config, name, side)

        def change(self, output: Any) -> Any:
            output.pooler_output = output.last_hidden_state[:, 0]
            return output


if hasattr(transformers, "RadioModel"):

    class RadioTowerConfig(transformers.RadioConfig):
        """RADIO's, under a type of its own."""

        model_type = "llm2clip_radio"

    class RadioTower(EvalWhileFrozen, Changed, transformers.RadioModel):
        """RADIO with the first class token alone, as timm has it, and without registers; no norm
        after the blocks."""

        config_class = RadioTowerConfig

        def change(self, states: Any) -> Any:
            """The pooled output is the first class token, not all of the summary."""
            last = states.last_hidden_state
            output = BaseModelOutputWithPooling(last, last[:, 0], states.hidden_states)
            return remove_tokens(output, 1, self.config.num_summary_tokens)

    register(RadioTowerConfig, RadioTower, "radio")


# Any timm vision transformer. Prefix tokens (class, registers) differ between models, so the states
# have none.

# arguments of timm's models that a configuration may set; others could name files, code or
# pretrained weights
ARGUMENTS = (
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "reg_tokens",
    "mlp_ratio",
    "init_values",
    "ref_feat_shape",
    "class_token",
    "no_embed_class",
    "qkv_bias",
    "pre_norm",
    "final_norm",
    "fc_norm",
    "pos_embed_grid_size",
    "global_pool",
    "attn_pool_num_heads",
    "attn_pool_mlp_ratio",
)


def make_timm(
    name: str,
    size: int | None,
    *,
    pretrained: bool,
    arguments: Mapping[str, Any] | None = None,
) -> Any:
    """The timm model without its classifier; ValueError for an unknown name, with similar ones, or
    argument."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            "this tower is a timm model; install timm: pip install 'timm>=1.0'"
        ) from error
    if timm.__version__.startswith("0."):
        raise ValueError(
            f"this tower requires timm 1.0 or newer; {timm.__version__} is installed"
        )
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8])
        raise ValueError(
            f"unknown timm model {name!r} (timm {timm.__version__}); similar names: {near}"
        )
    settings: dict[str, Any] = dict(arguments or {})
    if size is not None:
        settings["img_size"] = size
    if unknown := sorted(set(settings) - {*ARGUMENTS, "img_size"}):
        raise ValueError(
            f"timm_args: {unknown[0]!r} cannot be set here; known: {', '.join(ARGUMENTS)}"
        )
    try:
        model: Any = timm.create_model(
            name, pretrained=pretrained, num_classes=0, **settings
        )
    except (TypeError, AssertionError) as error:
        if "unexpected keyword argument 'img_size'" in str(error):
            raise ValueError(
                f"timm:{name} is not a plain vision transformer: timm's {name.split('_')[0]} "
                "takes no image size; choose one such as vit_*, deit3_*, beit_* or eva02_*"
            ) from error
        raise ValueError(
            f"timm {timm.__version__} cannot build {name!r} with {settings}: {error}"
        ) from error
    if hasattr(model, "merger"):
        # Qwen3-VL's tower: without its projector; it has no final norm
        model.merger = None
        model.global_pool = "avg"
        model.norm = nn.Identity()
    return model


class TimmVitConfig(PretrainedConfig):
    """The name of a timm model, and what is needed to know about it; ``timm_args`` override its
    arguments."""

    model_type = "llm2clip_timm"

    def __init__(
        self,
        timm_name: str = "vit_base_patch16_224",
        image_size: int = 224,  # pixels
        patch_size: int = 16,  # pixels
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        prefix_tokens: int = 1,  # before the patches; not in the states
        # rows of the position table before the patches'; -1: the model interpolates it
        position_class_rows: int = 1,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        resample: int | None = None,  # PIL's filter
        timm_args: dict[str, Any] | None = None,
        keeps_aspect: bool = False,  # takes images in their own aspect, too: Qwen3-VL's
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
        self.keeps_aspect = keeps_aspect
        super().__init__(**kwargs)


def timm_config(model: Any, name: str, arguments: Mapping[str, Any]) -> TimmVitConfig:
    """The configuration of a timm model: one list of blocks, square patches, a square grid; else
    ValueError."""
    parts = ["patch_embed", "blocks", "num_prefix_tokens", "pos_embed"]
    missing = [part for part in parts if not hasattr(model, part)]
    sizes = ["patch_size", "grid_size", "img_size"]
    if not missing:
        for size in sizes:
            if not isinstance(getattr(model.patch_embed, size, None), tuple | list):
                missing.append(f"patch_embed.{size} (rows, columns)")
    if missing:
        raise ValueError(
            f"timm:{name} is not a plain vision transformer: timm's {type(model).__name__} has no "
            f"{', '.join(missing)}"
        )
    height, width = model.patch_embed.patch_size
    rows, columns = model.patch_embed.grid_size
    pixels = tuple(model.patch_embed.img_size)
    if pixels != (rows * height, columns * width):
        raise ValueError(
            f"timm:{name} is not a plain vision transformer: a convolutional stem "
            f"({type(model.patch_embed).__name__}) makes {rows} x {columns} patches of "
            f"{pixels[0]} x {pixels[1]} pixels, as in MobileCLIP-B and ViTamin"
        )
    if height != width or rows != columns:
        raise ValueError(
            f"timm:{name}: patches ({height} x {width}) and grid ({rows} x {columns}) must be "
            "square"
        )
    class_rows = 0
    if hasattr(model, "pos_embed_grid_size"):  # the model interpolates its table
        class_rows = -1
    elif isinstance(model.pos_embed, nn.Parameter):
        class_rows = model.pos_embed.shape[1] - rows * columns
    # PIL's numbers
    filters = {
        "nearest": 0,
        "lanczos": 1,
        "bilinear": 2,
        "bicubic": 3,
        "box": 4,
        "hamming": 5,
    }
    return TimmVitConfig(
        timm_name=name,
        image_size=rows * height,
        patch_size=height,
        hidden_size=model.num_features,
        num_hidden_layers=len(model.blocks),
        prefix_tokens=model.num_prefix_tokens,
        position_class_rows=class_rows,
        image_mean=list(model.pretrained_cfg["mean"]),
        image_std=list(model.pretrained_cfg["std"]),
        resample=filters.get(model.pretrained_cfg["interpolation"]),
        timm_args=dict(arguments),
        keeps_aspect=class_rows < 0,
    )


def check_block_tokens(model: Any, config: TimmVitConfig) -> None:
    """ValueError unless every block of a timm model gets, and the last one gives, the prefix tokens
    and all patches: what ``TimmTower`` takes for patches lies behind the prefix. The model is moved
    to the meta device, where a forward pass computes shapes alone."""
    grid = config.image_size // config.patch_size
    expected = config.prefix_tokens + grid**2
    shapes: list[torch.Size] = []

    def record_input(block: Any, inputs: Any) -> None:
        shapes.append(inputs[0].shape)

    def record_output(block: Any, inputs: Any, output: Any) -> None:
        shapes.append(output.shape)

    for block in model.blocks:
        block.register_forward_pre_hook(record_input)
    model.blocks[-1].register_forward_hook(record_output)
    pixels = torch.empty(1, 3, config.image_size, config.image_size, device="meta")
    with torch.no_grad():
        model.to("meta").eval().forward_features(pixels)
    for number, shape in enumerate(shapes):
        if len(shape) != 3 or shape[1] != expected:
            raise ValueError(
                f"timm:{config.timm_name} cannot be a tower: hidden state {number} has the shape "
                f"{tuple(shape)}, expected (1, {expected}, {config.hidden_size}): "
                f"{config.prefix_tokens} class and register tokens, then {grid} x {grid} patches, "
                "in every block; in CaiT and ConViT, for example, the class token joins later"
            )


class TimmTower(PreTrainedModel):
    """A timm vision transformer with the states and outputs of a Hugging Face vision model."""

    config_class = TimmVitConfig
    main_input_name = "pixel_values"
    base_model_prefix = "timm"
    supports_gradient_checkpointing = True

    def __init__(self, config: TimmVitConfig) -> None:
        super().__init__(config)
        self.model: Any = make_timm(
            config.timm_name,
            config.image_size,
            pretrained=False,
            arguments=config.timm_args,
        )
        self.is_built_without_memory = any(
            parameter.is_meta for parameter in self.model.parameters()
        )
        self.post_init()

    @classmethod
    def from_timm(
        cls, name: str, *, pretrained: bool, arguments: Mapping[str, Any]
    ) -> "TimmTower":
        """The tower that ``make_timm`` makes, with its weights; raises as ``timm_config`` and
        ``check_block_tokens``."""
        model = make_timm(name, None, pretrained=pretrained, arguments=arguments)
        config = timm_config(model, name, arguments)
        tower = cls(config)
        tower.model.load_state_dict(model.state_dict())
        check_block_tokens(model, config)
        return tower

    def _init_weights(self, module: nn.Module) -> None:
        """timm initializes its own weights. Its tables of rotary positions are in no file, and
        transformers builds models without memory: they are computed once more. Raises ValueError if
        timm is too old for that."""
        if not module._non_persistent_buffers_set:
            return
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            return
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # pyright: ignore[reportCallIssue]
        elif self.is_built_without_memory:
            raise ValueError(
                f"this timm cannot compute the tables of its {type(module).__name__}; pip install "
                "-U timm"
            )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None
    ) -> None:
        """Recompute each block in the backward pass, with timm's own (non-reentrant)
        checkpointing."""
        self.model.set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self.model.set_grad_checkpointing(False)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        spatial_shapes: Tensor | None = None,
        **_: Any,  # of the language model's, which transformers 5 passes to the tower too
    ) -> Any:
        """(B, 3, S, S) -> last_hidden_state (B, N, H) normed, pooler_output (B, H), hidden_states
        on request. If it ``keeps_aspect``, also pixels or patches (B, N, 3 P P) with
        ``spatial_shapes`` (B, 2): see NaflexTower."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[Tensor] = []

        def keep_input(block: Any, inputs: Any) -> None:
            states.append(inputs[0])

        def keep_output(block: Any, inputs: Any, output: Any) -> None:
            states.append(output)

        handles = []
        if output_hidden_states:
            blocks = self.model.blocks
            handles = [block.register_forward_pre_hook(keep_input) for block in blocks]
            handles.append(blocks[-1].register_forward_hook(keep_output))
        try:
            tokens, pooled = self._features(pixel_values.to(self.dtype), spatial_shapes)
        finally:
            for handle in handles:
                handle.remove()
        skip = self.config.prefix_tokens
        hidden_states = None
        if output_hidden_states:
            hidden_states = tuple(state[:, skip:] for state in states)
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens[:, skip:],
            pooler_output=pooled,
            hidden_states=hidden_states,
        )
        return output if return_dict is not False else output.to_tuple()

    def _features(
        self, pixels: Tensor, spatial_shapes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, H) after the last norm, and what pools them (B, H); see ``forward``. Padded
        and masked, not grouped by grid: under ZeRO-3 all ranks must run a block equally often."""
        model = self.model
        if spatial_shapes is None:
            tokens = model.forward_features(pixels)
            if tokens.dim() == 3:
                return tokens, model.forward_head(tokens, pre_logits=True)
            # Qwen3-VL's: (B, rows, columns, H)
            return tokens.flatten(1, 2), tokens.mean((1, 2))
        if pixels.dim() == 3:  # as images of one column of patches
            side = self.config.patch_size
            patches = pixels.unflatten(2, (side, side, 3))
            pixels = patches.permute(0, 4, 1, 2, 3).flatten(2, 3)
        patch_BNH = model.patch_embed(pixels).flatten(1, 2)
        position_N = torch.arange(patch_BNH.shape[1], device=patch_BNH.device)
        mask_BN = position_N < spatial_shapes.prod(1, keepdim=True)
        # each image's patches with timm's positions and their rotation, then zeros
        placed: list[Tensor] = []
        rotations: list[Tensor] = []
        for image, (rows, columns) in zip(
            patch_BNH, spatial_shapes.tolist(), strict=True
        ):
            count = rows * columns
            padding = (0, 0, 0, len(image) - count)
            grid = image[:count].view(1, rows, columns, image.shape[1])
            tokens, rotation = model._pos_embed(grid)
            placed.append(nn.functional.pad(tokens.view(count, -1), padding))
            rotations.append(nn.functional.pad(rotation.view(count, -1), padding))
        tokens = torch.stack(placed)
        rope = torch.stack(rotations)[:, None]
        attn_mask = mask_BN[:, None, None]
        for block in model.blocks:
            call = block
            if model.grad_checkpointing:
                call = partial(checkpoint, block, use_reentrant=False)
            tokens = call(tokens, rope=rope, attn_mask=attn_mask)
        sum_BH = (tokens * mask_BN[..., None]).sum(1)
        return tokens, sum_BH / mask_BN.sum(1, keepdim=True)


AutoConfig.register(TimmVitConfig.model_type, TimmVitConfig, exist_ok=True)
AutoModel.register(TimmVitConfig, TimmTower, exist_ok=True)
