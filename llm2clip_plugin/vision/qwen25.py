"""Qwen2.5-VL's vision transformer as a Hugging Face model of square images.

Written from the report (arXiv 2502.13923, section 2.1.1) and checked against transformers: RMSNorm,
SwiGLU with biases, rotary positions of rows and columns, attention within windows of 112 x 112
pixels in all blocks but a few. transformers orders patches by window; here they stay row by row,
and a mask keeps the windows apart. A still image is shown to the original as two equal frames, so
both frames' weights of a patch are added up. The merger, which projects to the LLM, is left out.

This file stands alone, as it is saved with a LLaVA that is exported to Hugging Face. Shapes: B
images, T patches in row-major order, H width, N heads, E width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

ROPE_THETA = 10000.0
EPS = 1e-6  # of the norms


class Qwen25VisionConfig(PretrainedConfig):
    """The configuration of Qwen2.5-VL's tower; the defaults are those of 3B and 7B."""

    model_type = "llm2clip_qwen25"

    def __init__(
        self,
        hidden_size: int = 1280,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 16,
        intermediate_size: int = 3420,
        image_size: int = 448,  # pixels
        patch_size: int = 14,  # pixels
        window_size: int = 112,  # pixels
        spatial_merge_size: int = 2,  # patches, the side of what the merger makes one
        full_attention_blocks: tuple[int, ...] | list[int] = (7, 15, 23, 31),
        initializer_range: float = 0.02,
        **kwargs,  # Hugging Face's own fields of config.json
    ) -> None:
        sizes = {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads (num_heads in Qwen2.5-VL's config.json)": num_attention_heads,
            "intermediate_size": intermediate_size,
            "image_size": image_size,
            "patch_size": patch_size,
            "window_size": window_size,
            "spatial_merge_size": spatial_merge_size,
        }
        for name, size in sizes.items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} is {size!r}, expected a whole number above 0")
        if window_size < patch_size:
            raise ValueError(
                f"window_size {window_size} is below patch_size {patch_size}, both in pixels"
            )
        if not isinstance(full_attention_blocks, (list, tuple)):
            raise ValueError(
                "full_attention_blocks (fullatt_block_indexes in Qwen2.5-VL's config.json) is "
                f"{full_attention_blocks!r}, expected a list of block numbers"
            )
        if hidden_size % num_attention_heads or hidden_size // num_attention_heads % 4:
            raise ValueError(
                f"hidden_size {hidden_size} / num_attention_heads {num_attention_heads}, the head "
                "width, must be a multiple of 4"
            )
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.image_size = image_size
        self.patch_size = patch_size
        self.window_size = window_size
        self.spatial_merge_size = spatial_merge_size
        self.full_attention_blocks = list(full_attention_blocks)
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


def rope_tables(
    grid: int, head_width: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of grid x grid patches, both (T, E), float32: the first
    quarter of the channels turns with the row, the second with the column, and the other half
    repeats them."""
    axis = head_width // 2
    exponents = torch.arange(0, axis, 2, dtype=torch.float32, device=device) / axis
    positions = torch.arange(grid, dtype=torch.float32, device=device)
    angles_GA = torch.outer(positions, 1.0 / ROPE_THETA**exponents)
    rows = angles_GA.repeat_interleave(grid, dim=0)
    columns = angles_GA.repeat(grid, 1)
    angles_TE = torch.cat((rows, columns), dim=1).repeat(1, 2)
    return angles_TE.cos(), angles_TE.sin()


def rotate(x_BNTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotate channel pairs (e, e + E/2) by their angles, in float32."""
    first, second = x_BNTE.float().chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    return (x_BNTE * cos_TE + swapped * sin_TE).to(x_BNTE.dtype)


def window_mask(grid: int, window: int, device: torch.device | str) -> Tensor:
    """(T, T) bool: whether two patches lie in the same window of ``window`` x ``window`` patches,
    counted from the upper left."""
    index = torch.arange(grid, device=device) // window
    windows_in_row = -(-grid // window)
    window_T = (index[:, None] * windows_in_row + index).flatten()
    return window_T[:, None] == window_T


class Qwen25RMSNorm(nn.Module):
    """``weight * x / rms(x)``, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        normed = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * normed.to(x.dtype)


class Qwen25PatchEmbed(nn.Module):
    """Patches by one convolution without a bias."""

    def __init__(self, config: Qwen25VisionConfig) -> None:
        super().__init__()
        side = config.patch_size
        self.proj = nn.Conv2d(3, config.hidden_size, side, side, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.proj(pixel_values.to(self.proj.weight.dtype))
        return patches.flatten(2).mT


class Qwen25Attention(nn.Module):
    """Self-attention; fused, or plain matrix products if "eager"."""

    def __init__(self, config: Qwen25VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        # the model's own object: set_attn_implementation changes it
        self.config = config
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x_BTH: Tensor, rope: tuple[Tensor, Tensor], mask_TT: Tensor | None
    ) -> Tensor:
        parts = self.qkv(x_BTH).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        q = rotate(q, *rope)
        k = rotate(k, *rope)
        if self.config._attn_implementation == "eager":
            scores = q * q.shape[-1] ** -0.5 @ k.mT
            if mask_TT is not None:
                scores = scores.masked_fill(~mask_TT, float("-inf"))
            attended_BNTE = scores.float().softmax(dim=-1).to(v.dtype) @ v
        else:
            attended_BNTE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT)
        return self.proj(attended_BNTE.transpose(1, 2).flatten(2))


class Qwen25MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: Qwen25VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.gate_proj = nn.Linear(width, config.intermediate_size)
        self.up_proj = nn.Linear(width, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, width)

    def forward(self, x_BTH: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTH)) * self.up_proj(x_BTH))


class Qwen25Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: Qwen25VisionConfig) -> None:
        super().__init__()
        self.norm1 = Qwen25RMSNorm(config.hidden_size)
        self.norm2 = Qwen25RMSNorm(config.hidden_size)
        self.attn = Qwen25Attention(config)
        self.mlp = Qwen25MLP(config)

    def forward(
        self, x_BTH: Tensor, rope: tuple[Tensor, Tensor], mask_TT: Tensor | None
    ) -> Tensor:
        x_BTH = x_BTH + self.attn(self.norm1(x_BTH), rope, mask_TT)
        return x_BTH + self.mlp(self.norm2(x_BTH))


class Qwen25VisionModel(PreTrainedModel):
    """Qwen2.5-VL's tower without the merger: no class token, no norm after the blocks; the mean of
    the patches is pooled."""

    config_class = Qwen25VisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = "qwen25"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Qwen25Block"]  # noqa: RUF012 - transformers' own convention

    def __init__(self, config: Qwen25VisionConfig) -> None:
        super().__init__(config)
        merged = config.patch_size * config.spatial_merge_size
        if config.image_size % merged:
            raise ValueError(
                f"image_size {config.image_size} is not a multiple of {merged}: Qwen2.5-VL's tower "
                f"sees {config.spatial_merge_size} x {config.spatial_merge_size} patches of "
                f"{config.patch_size} pixels as one"
            )
        chosen: Any = self.config  # transformers has set the attention in it
        self.patch_embed = Qwen25PatchEmbed(config)
        blocks = [Qwen25Block(chosen) for _ in range(config.num_hidden_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.gradient_checkpointing = False  # set by gradient_checkpointing_enable
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """``set_attn_implementation`` takes effect; transformers 5 would guess it from the source
        text."""
        return True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Qwen25RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        """The patch convolution."""
        return self.patch_embed.proj

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,  # of the language model's, which transformers 5 passes to the tower too
    ) -> BaseModelOutputWithPooling | tuple:
        """(B, 3, S, S) -> last_hidden_state (B, T, H), pooler_output (B, H) their mean, and, on
        request, hidden_states: blocks + 1 tensors (B, T, H).

        Tables and mask are made in each call, as from_pretrained builds without memory, and would
        leave unsaved buffers empty.
        """
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        x_BTH = self.patch_embed(pixel_values)
        grid = pixel_values.shape[-1] // config.patch_size
        head_width = config.hidden_size // config.num_attention_heads
        rope = rope_tables(grid, head_width, x_BTH.device)
        window = config.window_size // config.patch_size
        mask_TT = window_mask(grid, window, x_BTH.device)
        states = [x_BTH]
        for number, block in enumerate(self.blocks):
            is_full = number in config.full_attention_blocks
            mask = None if is_full else mask_TT
            if self.gradient_checkpointing and self.training:
                x_BTH = self._gradient_checkpointing_func(
                    block.__call__, x_BTH, rope, mask
                )
            else:
                x_BTH = block(x_BTH, rope, mask)
            if output_hidden_states:
                states.append(x_BTH)
        output = BaseModelOutputWithPooling(
            last_hidden_state=x_BTH,
            pooler_output=x_BTH.mean(dim=1),
            hidden_states=tuple(states) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()


# transformers' own loaders open these towers once this module is imported
AutoConfig.register(Qwen25VisionConfig.model_type, Qwen25VisionConfig, exist_ok=True)
AutoModel.register(Qwen25VisionConfig, Qwen25VisionModel, exist_ok=True)
