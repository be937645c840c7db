"""The dual encoder of stage 2: a vision tower with a projection, and a text adapter on LLM
embeddings.

Shapes: B images, N captions, T tokens or patches, H width of the tower, W width of an LLM
embedding, D projection_dim.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.json_files import from_plain
from llm2clip_plugin.options import unknown
from llm2clip_plugin.safetensors_header import load_tensors
from llm2clip_plugin.vision.directory import (
    ADAPTER_FILE,
    LOG_SCALE,
    DualConfig,
    check_hash,
    fetch_directory,
    located,
)
from llm2clip_plugin.vision.families import Tower, family_of
from llm2clip_plugin.vision.parts import final_norm, parameters_in
from llm2clip_plugin.vision.towers import load_tower

# The text side of stage 2: maps a cached LLM embedding to the space of the image features.


class AdapterBlock(nn.Module):
    """Residual MLP block, ``x + down(gelu(up(norm(x))))``, exact GELU, norm with eps 1e-5."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x_NW: Tensor) -> Tensor:
        return x_NW + self.down(F.gelu(self.up(self.norm(x_NW))))


class TextAdapter(nn.Module):
    """LLM2CLIP's adapter: L2 normalization, residual MLP blocks, LayerNorm, Linear (arXiv
    2411.04997, section 3).

    ``adapter``: "mlp" as above; "linear" has no blocks; "none" returns the scaled input (then W
    must equal D). The output is not normalized. ``input_scale`` "sqrt_width" multiplies the
    L2-normalized input by sqrt(W), so that its entries have unit variance and the eps of the first
    norm is negligible. ``input_noise`` is drawn from torch's global generator of the input's
    device; a second forward pass repeats it only from the same generator state.
    """

    def __init__(self, config: DualConfig) -> None:
        super().__init__()
        width = config.llm_width
        is_none = config.adapter == "none"
        if is_none and width != config.projection_dim:
            raise ValueError(
                f"adapter 'none' needs llm_width == projection_dim, got {width}, "
                f"{config.projection_dim}"
            )
        self.llm_width = width
        self.normalize_input = config.normalize_input
        self.input_factor = width**0.5 if config.input_scale == "sqrt_width" else 1.0
        self.input_noise = config.input_noise
        depth = config.adapter_blocks if config.adapter == "mlp" else 0
        self.blocks = nn.ModuleList(
            AdapterBlock(width, config.adapter_expansion) for _ in range(depth)
        )
        self.norm = nn.Identity() if is_none else nn.LayerNorm(width, eps=1e-5)
        self.projection = (
            nn.Identity() if is_none else nn.Linear(width, config.projection_dim)
        )

    def forward(self, embeddings_NW: Tensor, noise_NW: Tensor | None = None) -> Tensor:
        """(N, W) raw embeddings of any dtype -> (N, D) in the parameters' dtype; ValueError for
        another W. ``noise_NW``: standard normal values to use in training instead of the
        generator's."""
        if embeddings_NW.shape[-1] != self.llm_width:
            widths = (
                f"width {embeddings_NW.shape[-1]}, but the text "
                f"adapter expects {self.llm_width}"
            )
            raise ValueError(
                f"LLM embeddings have {widths}; use those of the LLM that it was trained with"
            )
        x_NW = embeddings_NW.float()
        if self.normalize_input:
            # x / max(|x|, 1e-12): a zero row stays zero
            x_NW = F.normalize(x_NW, dim=-1)
        x_NW = x_NW * self.input_factor
        if self.training and self.input_noise > 0:
            x_NW = x_NW + self.input_noise * (
                torch.randn_like(x_NW) if noise_NW is None else noise_NW
            )
        if isinstance(self.projection, nn.Linear):
            x_NW = x_NW.to(self.projection.weight.dtype)
        for block in self.blocks:
            x_NW = block(x_NW)
        return self.projection(self.norm(x_NW))


CHOICES = {
    "pool": ("pooled", "cls", "mean", "cls_mean"),
    "projection": ("linear", "mlp", "none"),
    "adapter": ("mlp", "linear", "none"),
    "input_scale": ("unit", "sqrt_width"),
}
MAX_LOGIT_SCALE = 100.0  # as CLIP clamps it


class DualFeatures(NamedTuple):
    """One forward pass of a dual encoder, in float32; None for patches not requested."""

    image_BD: Tensor  # L2-normalized
    text_ND: Tensor  # L2-normalized
    log_scale: Tensor  # (1,) natural logarithm of the logits' factor
    bias: (
        Tensor  # (1,) of the logits, for the sigmoid loss; 0 if the encoder learns none
    )
    # of the hidden state ``patches``, as an MLLM reads them
    patches_BTH: Tensor | None = None
    # of the hidden state ``patch_features``, L2-normalized
    patch_features_BTD: Tensor | None = None


def patch_mask(spatial_shapes: Tensor, patches: int) -> Tensor:
    """(B, 2) rows and columns -> (B, T) bool: the patches, of ``patches`` T, that an image has."""
    return torch.arange(patches, device=spatial_shapes.device) < spatial_shapes.prod(
        1, keepdim=True
    )


class DualEncoder(nn.Module):
    """Tower and text adapter; both encoders return L2-normalized float32 features. Parameters that
    this pooling gives no gradient are frozen. ``logit_scale``, the log of ``scale``, is of shape
    (1,): DeepSpeed rejects 0-dim ones."""

    tower: Tower
    visual_projection: Any  # nn.Linear, nn.Sequential or nn.Identity

    def __init__(self, tower: Tower, config: DualConfig) -> None:
        super().__init__()
        self.family = family_of(tower)
        log_scale = config.logit_scale_init
        if log_scale is None:
            log_scale = LOG_SCALE
        for name, choices in CHOICES.items():
            if (chosen := getattr(config, name)) not in choices:
                raise ValueError(unknown(name, chosen, choices))
        if config.pool in ("cls", "cls_mean") and not self.family.has_cls:
            raise ValueError(
                f"pool {config.pool!r} requires a class token; this tower has none; use pooled or "
                "mean"
            )
        if config.pool == "pooled" and not self.family.has_pooled_output(tower.config):
            raise ValueError(
                "this tower has no pooling head (vision_use_head is false, as in most towers of "
                "vision-language models); set --dual.pool mean"
            )
        self.tower = tower
        # as the card records it: the scale as a number, and no initial deviation
        self.config = dataclasses.replace(
            config, logit_scale_init=log_scale, projection_init_std=None
        )
        width = tower.config.hidden_size * (2 if config.pool == "cls_mean" else 1)
        if config.projection == "none" and width != config.projection_dim:
            raise ValueError(
                f"projection 'none' requires projection_dim {width}, got {config.projection_dim}"
            )
        self.visual_norm = nn.Identity()
        if config.projection_norm:
            self.visual_norm = nn.LayerNorm(width)
        self.visual_projection = nn.Identity()
        if config.projection == "linear":
            self.visual_projection = nn.Linear(
                width, config.projection_dim, bias=config.projection_bias
            )
            std = config.projection_init_std
            if std is None:
                std = width**-0.5  # CLIP's
            nn.init.normal_(self.visual_projection.weight, std=std)
            if config.projection_bias:
                nn.init.zeros_(self.visual_projection.bias)
        elif config.projection == "mlp":  # LIFT: open_clip/lift_model.py:24-39
            self.visual_projection = nn.Sequential(
                nn.Linear(width, config.projection_dim),
                nn.GELU(),
                nn.Linear(config.projection_dim, config.projection_dim),
            )
        self.text_adapter = TextAdapter(config) if config.llm_width else None
        self.logit_scale = nn.Parameter(torch.full((1,), log_scale))
        bias = config.logit_bias_init
        self.logit_bias = None if bias is None else nn.Parameter(torch.full((1,), bias))
        unused = list(self.family.never_trained)
        if config.pool != "pooled":
            unused += self.family.pooling_head
        for parameter in parameters_in(tower, unused):
            parameter.requires_grad_(False)

    @property
    def scale(self) -> Tensor:
        """``exp(logit_scale)``, at most 100, shape (1,)."""
        return self.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    def pool(
        self, pixel_values: Tensor, spatial_shapes: Tensor | None = None
    ) -> Tensor:
        """(B, 3, S, S) -> the image feature before the projection: (B, H), or (B, 2H) for cls_mean.

        ``spatial_shapes`` (B, 2): of images that keep their aspect (data.images.as_square), for
        towers that take them.
        """
        return self._pooled(self._outputs(pixel_values, spatial_shapes), spatial_shapes)

    def _outputs(
        self, pixel_values: Tensor, spatial_shapes: Tensor | None, **options: Any
    ) -> Any:
        shapes = {} if spatial_shapes is None else {"spatial_shapes": spatial_shapes}
        return self.tower(
            pixel_values=pixel_values.to(self.tower.dtype), **shapes, **options
        )

    def _pooled(self, output: Any, spatial_shapes: Tensor | None) -> Tensor:
        """The tower's output -> what ``pool`` returns."""
        if self.config.pool == "pooled":
            return output.pooler_output
        tokens_BTH = output.last_hidden_state
        if not self.family.last_state_is_normed:
            tokens_BTH = final_norm(self.tower)(tokens_BTH)
        patches_BTH = tokens_BTH[:, 1:] if self.family.has_cls else tokens_BTH
        if self.config.pool == "mean" and spatial_shapes is not None:
            mask_BT = patch_mask(spatial_shapes, patches_BTH.shape[1])
            weight_BT1 = mask_BT.unsqueeze(-1).to(patches_BTH)
            return (patches_BTH * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1)
        if self.config.pool == "mean":
            return patches_BTH.mean(dim=1)
        cls_BH = tokens_BTH[:, 0]
        if self.config.pool == "cls":
            return cls_BH
        return torch.cat((cls_BH, patches_BTH.mean(dim=1)), dim=-1)

    def encode_image(
        self, pixel_values: Tensor, spatial_shapes: Tensor | None = None
    ) -> Tensor:
        """(B, 3, S, S) preprocessed pixels -> (B, D), L2-normalized, float32; ``spatial_shapes``:
        see ``pool``."""
        return self.project(self.pool(pixel_values, spatial_shapes))

    def encode_with_patches(
        self,
        pixel_values: Tensor,
        spatial_shapes: Tensor | None = None,
        *,
        patches: int | None = None,
        patch_features: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``encode_image``; patches (B, T, H) of hidden state number ``patches``; features (B, T,
        D) of the patches of number ``patch_features``. All float32; None for a number that is None.

        A patch's feature is what ``pool`` and ``project`` give for an image whose tokens, after the
        final norm, all are this patch, without the family's pooling head.
        """
        if patches is None and patch_features is None:
            return self.encode_image(pixel_values, spatial_shapes), None, None
        output = self._outputs(pixel_values, spatial_shapes, output_hidden_states=True)
        first = int(self.family.has_cls)
        raw_BTH = None
        if patches is not None:
            raw_BTH = output.hidden_states[patches][:, first:].float()
        feature_BTD = None
        if patch_features is not None:
            state_BTH = output.hidden_states[patch_features][:, first:]
            normed_BTH = final_norm(self.tower)(state_BTH)
            copies = 2 if self.config.pool == "cls_mean" else 1
            feature_BTD = self.project(torch.cat([normed_BTH] * copies, dim=-1))
        return self.project(self._pooled(output, spatial_shapes)), raw_BTH, feature_BTD

    def project(self, feature_BH: Tensor) -> Tensor:
        """Of `pool` -> (B, D), L2-normalized, float32; any number of leading dimensions."""
        return F.normalize(
            self.visual_projection(self.visual_norm(feature_BH)).float(), dim=-1
        )

    def encode_text(
        self, llm_embeddings: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """(N, W) LLM embeddings, ``noise`` as for TextAdapter -> (N, D) float32, L2-normalized.
        Raises ValueError."""
        if self.text_adapter is None:
            raise ValueError(
                "cannot encode captions: the dual encoder has no text adapter (llm_width is 0)"
            )
        return F.normalize(self.text_adapter(llm_embeddings, noise).float(), dim=-1)

    def forward(
        self,
        pixel_values: Tensor,
        embeddings: Tensor,
        noise: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **patch_layers: int,
    ) -> DualFeatures:
        """Pixels (B, 3, S, S), LLM embeddings (N, W) -> what a loss needs; further arguments as of
        the two encoders."""
        image_BD, *patches = self.encode_with_patches(
            pixel_values, spatial_shapes, **patch_layers
        )
        text_ND = self.encode_text(embeddings, noise)
        bias = self.logit_bias
        if bias is None:
            bias = torch.zeros_like(self.logit_scale)
        # products, not the parameters themselves: ZeRO-3 frees those when this call ends
        log_scale = self.logit_scale.float() * 1
        bias = bias.float() * 1
        return DualFeatures(image_BD, text_ND, log_scale, bias, *patches)


class LoadedDualEncoder(nn.Module):
    """A trained dual encoder for retrieval; ``embed``: strings -> (N, W), their embeddings by the
    tower's teacher."""

    def __init__(
        self,
        dual: DualEncoder,
        card: TowerCard,
        embed: Callable[[Sequence[str]], Tensor],
    ) -> None:
        super().__init__()
        self.dual = dual
        self.card = card
        self._embed = embed

    @property
    def logit_scale(self) -> Tensor:
        """The factor of the logits, not its logarithm; shape (1,)."""
        return self.dual.scale.detach()

    def encode_image(
        self, pixel_values: Tensor, spatial_shapes: Tensor | None = None
    ) -> Tensor:
        return self.dual.encode_image(pixel_values, spatial_shapes)

    def encode_text(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """N texts (one string is one text), or (N, W) embeddings of them by the teacher -> (N, D).
        Raises ValueError for a blank text, another W, or a teacher that is not at hand."""
        if not isinstance(texts, Tensor):
            texts = self._embed([texts] if isinstance(texts, str) else list(texts))
        return self.dual.encode_text(texts.to(self.logit_scale.device))


def heads_state(dual: DualEncoder) -> dict[str, Tensor]:
    """Every tensor of the dual encoder except the tower's: the contents of
    text_adapter.safetensors."""
    return {
        name: value
        for name, value in dual.state_dict().items()
        if not name.startswith("tower.")
    }


def read_dual_card(directory: Path) -> tuple[TowerCard, DualConfig]:
    """The card of a dual encoder's directory, its paths made absolute, and the DualConfig in it;
    ValueError without."""
    card = located(TowerCard.read(directory / TowerCard.FILE), directory)
    if not card.projection_dim:
        fit = (
            f"fit heads on it (train-tower --tower {directory} --num-train-epochs 0) or open it "
            "with load_tower"
        )
        raise ValueError(
            f"{directory} contains only a tower, without a projection; {fit}"
        )
    return card, from_plain(
        DualConfig, card.dual, where=f"{directory / card.FILE}: dual"
    )


def load_heads(dual: DualEncoder, source: str | os.PathLike[str]) -> None:
    """Load the projection, text adapter and logit scale of a tower directory into ``dual``, in
    place. Raises ValueError for a tower alone, or other settings than ``dual``'s; ContractError if
    its tensors don't match its card."""
    directory = fetch_directory(source)
    _, theirs = read_dual_card(directory)
    initial = {
        "input_noise": dual.config.input_noise,
        "logit_scale_init": dual.config.logit_scale_init,
    }
    if theirs.logit_bias_init is not None and dual.config.logit_bias_init is not None:
        initial["logit_bias_init"] = dual.config.logit_bias_init
    ours = dataclasses.asdict(dual.config)
    theirs = dataclasses.asdict(theirs) | initial
    different: list[str] = []
    for name, value in ours.items():
        if value != theirs[name]:
            different.append(f"{name} {theirs[name]!r} (not {value!r})")
    if different:
        raise ValueError(
            f"the heads in {directory} were saved with {', '.join(different)}; set dual.* to these "
            "values"
        )
    check_hash(directory, ADAPTER_FILE)
    state = load_tensors(directory / ADAPTER_FILE)
    shapes = _shapes(state)
    expected = _shapes(heads_state(dual))
    if shapes != expected:
        wrong = sorted(shapes.items() ^ expected.items())
        raise ContractError(
            f"{directory / ADAPTER_FILE} does not match {TowerCard.FILE}: {wrong}"
        )
    # complete but for the tower, as just checked
    dual.load_state_dict(state, strict=False)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def load_dual(
    source: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32
) -> tuple[DualEncoder, TowerCard]:
    """The dual encoder of a tower directory, to train further or to export, and its card. Raises
    FileNotFoundError without a card, ValueError for a tower alone, ContractError if the adapter's
    tensors don't match the card."""
    directory = fetch_directory(source)
    card, config = read_dual_card(directory)
    dual = DualEncoder(load_tower(directory, dtype=dtype), config)
    load_heads(dual, directory)
    return dual.to(dtype).eval(), card
