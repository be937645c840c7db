"""EVA-CLIP's vision transformers as a Hugging Face model: EVA02 B/16, L/14, L/14-336, bigE/14,
EVA01 g/14 and B/16.

Written from the papers (EVA-02, arXiv 2303.11331; EVA-CLIP, arXiv 2303.15389; RoPE, arXiv
2104.09864) and checked against the reference with golden tensors. The configuration selects the
variant:

|                     | norm | MLP    | sub-norms | rotary | layer scale |
|---------------------|------|--------|-----------|--------|-------------|
| EVA02 B, L, L-336   | pre  | SwiGLU | yes       | yes    | no          |
| EVA02 bigE          | post | GELU   | no        | no     | no          |
| EVA01 g             | pre  | GELU   | no        | no     | no          |
| EVA01 B             | pre  | GELU   | no        | no     | yes         |

Shapes: B images, T tokens (class token, then patches in row-major order), H width, N heads, E width
of a head.
"""

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

ROPE_THETA = 10000.0
# cosines and sines (T, E), complex turns (T, E/2)
Rope: TypeAlias = tuple[Tensor, Tensor, Tensor | None]

# torch 2.0 has none: False
_is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", bool)


class Eva02Config(PretrainedConfig):
    """The configuration of an EVA-CLIP tower; the defaults are EVA02-CLIP-L/14-336."""

    model_type = "llm2clip_eva02"

    def __init__(
        self,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 2730,  # int(1024 * 2.6667), truncated as in the reference
        image_size: int = 336,  # pixels
        patch_size: int = 14,  # pixels
        num_channels: int = 3,
        hidden_act: str = "swiglu",  # swiglu | gelu (exact)
        sub_norm: bool = True,  # norms before the last projection of attention and of the MLP
        post_norm: bool = False,  # norms after the branches instead of before them
        rope: bool = True,  # rotary positions in queries and keys of the patches
        rope_pretrained_grid: int = 16,  # grid side that rotary positions are scaled to
        layer_scale: bool = False,  # a learned factor per channel on each branch
        qkv_bias: bool = True,  # biases on queries and values
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        **kwargs,  # Hugging Face's own fields of config.json
    ) -> None:
        if hidden_act not in ("swiglu", "gelu"):
            raise ValueError(f"unknown hidden_act {hidden_act!r}; known: swiglu, gelu")
        if hidden_size % num_attention_heads or (
            rope and hidden_size // num_attention_heads % 4
        ):
            sizes = (
                f"hidden_size {hidden_size} / num_attention_heads {num_attention_heads}"
            )
            raise ValueError(
                f"{sizes}, the head width, must be an integer, with rotary positions a multiple of "
                "4"
            )
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_act = hidden_act
        self.sub_norm = sub_norm
        self.post_norm = post_norm
        self.rope = rope
        self.rope_pretrained_grid = rope_pretrained_grid
        self.layer_scale = layer_scale
        self.qkv_bias = qkv_bias
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


def rope_tables(
    *,
    grid: int,
    pretrained_grid: int,
    head_width: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles of grid x grid patches, both (grid * grid, E),
    float32.

    A patch at row r, column c has angle ``t * 10000 ** (-2j / (E/2))`` for j = 0 .. E/4 - 1 with t
    = r / grid * pretrained_grid in the first half of a head, and likewise for c in the second; each
    angle occurs twice, for a pair of adjacent channels.
    """
    numbers_G = torch.arange(grid, dtype=torch.float32, device=device)
    positions_G = numbers_G / grid * pretrained_grid
    axis = head_width // 2  # channels of a row's angles, and of a column's
    exponents = torch.arange(0, axis, 2, dtype=torch.float32, device=device) / axis
    frequencies = 1.0 / ROPE_THETA**exponents
    angles_GA = repeat(torch.outer(positions_G, frequencies), "g f -> g (f two)", two=2)
    rows = repeat(angles_GA, "h a -> (h w) a", w=grid)
    columns = repeat(angles_GA, "w a -> (h w) a", h=grid)
    angles = torch.cat((rows, columns), dim=-1)
    return angles.cos(), angles.sin()


def rotate(
    x_BTNE: Tensor, cos_TE: Tensor, sin_TE: Tensor, turns_TC: Tensor | None = None
) -> Tensor:
    """Rotate pairs of adjacent channels (a, b) by their angle: (a cos - b sin, b cos + a sin).

    ``sin_TE`` is negated in the even channels. Before the heads are transposed the memory is
    contiguous, which halves the cost. With ``turns_TC`` (see ``complex_turns``) a pair is a complex
    number, rotated by one product. Compilers and ONNX, which don't support complex numbers, see the
    plain formula.
    """
    if _is_traced():
        pairs = rearrange(x_BTNE, "... (e two) -> ... e two", two=2)
        swapped_pairs = torch.stack((pairs[..., 1], pairs[..., 0]), dim=-1)
        swapped = rearrange(swapped_pairs, "... e two -> ... (e two)")
        return torch.addcmul(x_BTNE * cos_TE[:, None], swapped, sin_TE[:, None])
    if turns_TC is None:
        return _Rotation.apply(x_BTNE, cos_TE, sin_TE)
    pairs = rearrange(x_BTNE.float(), "... (e two) -> ... e two", two=2)
    turned = torch.view_as_complex(pairs) * turns_TC[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x_BTNE.dtype)


class _Rotation(torch.autograd.Function):
    """``rotate`` in place on the even and the odd channels of one product, without a swapped copy;
    the gradient is rotated back. On a CPU, which reads every other value slowly, complex numbers
    are faster in half precision, too."""

    @staticmethod
    def forward(ctx: Any, x_BTNE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TE, sin_TE)
        y_BTNE = x_BTNE * cos_TE[:, None]
        # as pairs of channels
        x = x_BTNE.unflatten(-1, (-1, 2))
        y = y_BTNE.unflatten(-1, (-1, 2))
        sin = sin_TE[:, None].unflatten(-1, (-1, 2))
        y[..., 0].addcmul_(x[..., 1], sin[..., 0])
        y[..., 1].addcmul_(x[..., 0], sin[..., 1])
        return y_BTNE

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos_TE, sin_TE = ctx.saved_tensors
        return _Rotation.apply(grad, cos_TE, -sin_TE), None, None


def _is_traced() -> bool:
    return _is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def complex_turns(cos_TE: Tensor, sin_TE: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``cos + i sin`` for each pair of float32 tables, (T, E/2), complex64; None where something
    else is faster for states of ``dtype``, or complex numbers are not supported."""
    if _is_traced() or dtype == torch.float64:
        return None
    device = cos_TE.device.type
    if device == "cpu" or (device == "cuda" and dtype == torch.float32):
        return torch.complex(cos_TE[:, 0::2], sin_TE[:, 1::2])
    return None


class Eva02Embeddings(nn.Module):
    """Patches by one convolution, preceded by the class token, plus learned positions; no norm."""

    def __init__(self, config: Eva02Config) -> None:
        super().__init__()
        width = config.hidden_size
        tokens = 1 + (config.image_size // config.patch_size) ** 2
        self.image_size = config.image_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, tokens, width))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, width, config.patch_size, config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {tuple(pixel_values.shape[-2:])} pixels, expected {self.image_size} "
                "squared"
            )
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        patches_BTH = rearrange(
            self.patch_embedding(pixel_values), "b c h w -> b (h w) c"
        )
        cls_B1H = self.cls_token.expand(patches_BTH.shape[0], -1, -1)
        return torch.cat((cls_B1H, patches_BTH), dim=1) + self.position_embedding


def plain_attention(q_BNTE: Tensor, k_BNTE: Tensor, v_BNTE: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(E)) v`` without a fused kernel."""
    scale = q_BNTE.shape[-1] ** -0.5
    score_BNTT = (q_BNTE * scale) @ k_BNTE.mT
    return score_BNTT.softmax(dim=-1) @ v_BNTE


class Eva02Attention(nn.Module):
    """Self-attention with optional biases on queries and values; fused, or ``plain_attention`` if
    "eager"."""

    def __init__(self, config: Eva02Config) -> None:
        super().__init__()
        width = config.hidden_size
        # the model's own object: set_attn_implementation changes it
        self.config = config
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.inner_norm = nn.Identity()
        if config.sub_norm:
            self.inner_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BTH: Tensor, rope: Rope | None) -> Tensor:
        q = rearrange(self.q_proj(x_BTH), "b t (n e) -> b t n e", n=self.heads)
        k = rearrange(self.k_proj(x_BTH), "b t (n e) -> b t n e", n=self.heads)
        v = rearrange(self.v_proj(x_BTH), "b t (n e) -> b t n e", n=self.heads)
        if rope is not None:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        q, k, v = (rearrange(x, "b t n e -> b n t e") for x in (q, k, v))
        attend = F.scaled_dot_product_attention
        if self.config._attn_implementation == "eager":
            attend = plain_attention
        attended_BTH = rearrange(attend(q, k, v), "b n t e -> b t (n e)")
        return self.out_proj(self.inner_norm(attended_BTH))


class _GatedSiLU(torch.autograd.Function):
    """``silu(gate) * up`` of the first ``width`` channels, the others being 0; saves only its two
    inputs: the backward pass recomputes the SiLU."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate[..., :width]).mul_(up[..., :width])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        if padding := gate.shape[-1] - grad.shape[-1]:
            grad = F.pad(grad, (0, padding))
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        grad_up = F.silu(gate).mul_(grad)
        return grad_gate, grad_up, None


class PaddedLinear(nn.Linear):
    """``nn.Linear`` that computes, if ``padded``, with widths that are multiples of 8: outputs
    beyond its own are 0.

    It pads its weight at each call: what trains, is partitioned, averaged and saved has the width
    of the model.
    """

    def forward(self, x: Tensor, padded: bool = False) -> Tensor:
        rows = -self.out_features % 8
        columns = -self.in_features % 8
        if not padded or not rows + columns:
            return super().forward(x)
        weight = F.pad(self.weight, (0, columns, 0, rows))
        bias = F.pad(self.bias, (0, rows))
        return F.linear(F.pad(x, (0, columns)) if columns else x, weight, bias)


class Eva02SwiGLU(nn.Module):
    """``down(norm(silu(gate(x)) * up(x)))``.

    On a GPU its products have a hidden width that is a multiple of 8, which the fast kernels of
    half precision need: EVA02 L/14's is 2730.
    """

    def __init__(self, config: Eva02Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.hidden = config.intermediate_size
        self.gate_proj = PaddedLinear(width, self.hidden)
        self.up_proj = PaddedLinear(width, self.hidden)
        self.norm = nn.Identity()
        if config.sub_norm:
            self.norm = nn.LayerNorm(self.hidden, eps=config.layer_norm_eps)
        self.down_proj = PaddedLinear(self.hidden, width)

    def forward(self, x_BTH: Tensor) -> Tensor:
        padded = {"padded": True} if self._pads(x_BTH) else {}
        gate = self.gate_proj(x_BTH, **padded)
        up = self.up_proj(x_BTH, **padded)
        if torch.is_grad_enabled():
            gated = _GatedSiLU.apply(gate, up, self.hidden)
        else:
            gated = F.silu(gate[..., : self.hidden]).mul_(up[..., : self.hidden])
        return self.down_proj(self.norm(gated), **padded)

    def _pads(self, like: Tensor) -> bool:
        """Not if PEFT or bitsandbytes has replaced a layer, and not under a compiler, which pads by
        itself."""
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        is_unchanged = all(type(layer) is PaddedLinear for layer in layers)
        return like.is_cuda and is_unchanged and not _is_traced()


class Eva02Mlp(nn.Module):
    """``fc2(norm(gelu(fc1(x))))``, exact GELU."""

    def __init__(self, config: Eva02Config) -> None:
        super().__init__()
        hidden = config.intermediate_size
        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.norm = nn.Identity()
        if config.sub_norm:
            self.norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.fc2 = nn.Linear(hidden, config.hidden_size)

    def forward(self, x_BTH: Tensor) -> Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(x_BTH))))


class Eva02Block(nn.Module):
    """Pre-norm ``x + scale * branch(norm(x))`` or post-norm ``x + scale * norm(branch(x))``, for
    attention and MLP."""

    def __init__(self, config: Eva02Config) -> None:
        super().__init__()
        width = config.hidden_size
        eps = config.layer_norm_eps
        self.post_norm = config.post_norm
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.attention = Eva02Attention(config)
        self.mlp = (
            Eva02SwiGLU(config) if config.hidden_act == "swiglu" else Eva02Mlp(config)
        )
        self.scale1 = nn.Parameter(torch.ones(width)) if config.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if config.layer_scale else None

    def forward(self, x_BTH: Tensor, rope: Rope | None) -> Tensor:
        if self.post_norm:
            attended_BTH = self.norm1(self.attention(x_BTH, rope))
        else:
            attended_BTH = self.attention(self.norm1(x_BTH), rope)
        if self.scale1 is not None:
            attended_BTH = self.scale1 * attended_BTH
        x_BTH = x_BTH + attended_BTH
        if self.post_norm:
            mixed_BTH = self.norm2(self.mlp(x_BTH))
        else:
            mixed_BTH = self.mlp(self.norm2(x_BTH))
        if self.scale2 is not None:
            mixed_BTH = self.scale2 * mixed_BTH
        return x_BTH + mixed_BTH


class Eva02VisionModel(PreTrainedModel):
    """EVA-CLIP's image tower without its head: states after every block, all tokens normed, class
    token pooled."""

    config_class = Eva02Config
    main_input_name = "pixel_values"
    base_model_prefix = "eva02"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Eva02Block"]  # noqa: RUF012 - transformers' own convention

    def __init__(self, config: Eva02Config) -> None:
        super().__init__(config)
        chosen: Any = self.config  # transformers has set the attention in it
        self.embeddings = Eva02Embeddings(config)
        self.blocks = nn.ModuleList(
            Eva02Block(chosen) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False  # set by gradient_checkpointing_enable
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """``set_attn_implementation`` takes effect; transformers 5 would guess it from the source
        text."""
        return True

    def _init_weights(self, module: nn.Module) -> None:
        deviation = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=deviation)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Eva02Embeddings):
            nn.init.trunc_normal_(module.cls_token, std=deviation)
            nn.init.trunc_normal_(module.position_embedding, std=deviation)
        elif (
            isinstance(module, Eva02Block)
            and module.scale1 is not None
            and module.scale2 is not None
        ):
            nn.init.constant_(module.scale1, 0.1)
            nn.init.constant_(module.scale2, 0.1)

    def get_input_embeddings(self) -> nn.Module:
        """The patch convolution."""
        return self.embeddings.patch_embedding

    def _rope(self, like: Tensor) -> Rope | None:
        """The tables that ``rotate`` needs, in ``like``'s dtype and on its device; the class token
        is not rotated. Made in each forward pass, as from_pretrained builds without memory, and
        would leave unsaved buffers empty."""
        config = self.config
        if not config.rope:
            return None
        cos, sin = rope_tables(
            grid=config.image_size // config.patch_size,
            pretrained_grid=config.rope_pretrained_grid,
            head_width=config.hidden_size // config.num_attention_heads,
            device=like.device,
        )
        sin[:, 0::2] *= -1
        cos = F.pad(cos, (0, 0, 1, 0), value=1.0)
        sin = F.pad(sin, (0, 0, 1, 0), value=0.0)
        turns = complex_turns(cos, sin, like.dtype)
        # shared by all blocks, each of which would otherwise save another copy for backward
        return cos.to(like.dtype), sin.to(like.dtype), turns

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,  # of the language model's, which transformers 5 passes to the tower too
    ) -> BaseModelOutputWithPooling | tuple:
        """(B, 3, S, S) -> last_hidden_state (B, T, H) after the final norm, pooler_output (B, H)
        its class token, and, on request, hidden_states: blocks + 1 tensors (B, T, H) before any
        final norm."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x_BTH = self.embeddings(pixel_values)
        rope = self._rope(x_BTH)
        states = [x_BTH]
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x_BTH = self._gradient_checkpointing_func(block.__call__, x_BTH, rope)
            else:
                x_BTH = block(x_BTH, rope)
            if output_hidden_states:
                states.append(x_BTH)
        normed_BTH = self.norm(x_BTH)
        output = BaseModelOutputWithPooling(
            last_hidden_state=normed_BTH,
            pooler_output=normed_BTH[:, 0],
            hidden_states=tuple(states) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()


# transformers' own loaders open these towers once this module is imported
AutoConfig.register(Eva02Config.model_type, Eva02Config, exist_ok=True)
AutoModel.register(Eva02Config, Eva02VisionModel, exist_ok=True)
