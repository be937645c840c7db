"""The text side of stage 2: maps a cached LLM embedding to the space of the image features.

Shapes: N captions, W width of an LLM embedding, D projection_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip_plugin.options.names import unknown

KINDS = ("mlp", "linear", "none")
INPUT_SCALES = ("unit", "sqrt_width")


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
    """LLM2CLIP's adapter: L2 normalization, residual MLP blocks, LayerNorm, Linear (arXiv 2411.04997, section 3).

    ``kind``: "mlp" as above; "linear" has no blocks; "none" returns the scaled input (then W must equal D).
    The output is not normalized.
    ``input_scale``: "unit" keeps the L2-normalized input, "sqrt_width" multiplies it by sqrt(W), so that its entries
    have unit variance and the eps of the first norm is negligible.
    ``input_noise``: standard deviation of Gaussian noise added to the scaled input in training, from torch's global
    generator of the input's device; a second forward pass repeats it only from the same generator state.
    """

    def __init__(
        self,
        llm_width: int,
        projection_dim: int,
        *,
        blocks: int = 4,
        expansion: int = 2,
        kind: str = "mlp",
        normalise_input: bool = True,
        input_scale: str = "unit",
        input_noise: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(unknown("adapter kind", kind, KINDS))
        if input_scale not in INPUT_SCALES:
            raise ValueError(unknown("input_scale", input_scale, INPUT_SCALES))
        if kind == "none" and llm_width != projection_dim:
            raise ValueError(
                f"adapter kind 'none' needs llm_width == projection_dim, got {llm_width} and {projection_dim}"
            )
        self.llm_width = llm_width
        self.normalise_input = normalise_input
        self.input_factor = llm_width**0.5 if input_scale == "sqrt_width" else 1.0
        self.input_noise = input_noise
        depth = blocks if kind == "mlp" else 0
        self.blocks = nn.ModuleList(AdapterBlock(llm_width, expansion) for _ in range(depth))
        self.norm = nn.Identity() if kind == "none" else nn.LayerNorm(llm_width, eps=1e-5)
        self.projection = nn.Identity() if kind == "none" else nn.Linear(llm_width, projection_dim)

    def forward(self, embeddings_NW: Tensor, noise_NW: Tensor | None = None) -> Tensor:
        """(N, W) raw embeddings of any dtype -> (N, D) in the parameters' dtype.

        ``noise_NW``: standard normal values to use in training instead of the generator's.
        Raises ValueError for another W.
        """
        if embeddings_NW.shape[-1] != self.llm_width:
            raise ValueError(
                f"LLM embeddings have width {embeddings_NW.shape[-1]}, but the text adapter expects {self.llm_width}; "
                "use embeddings of the LLM that it was trained with"
            )
        x_NW = embeddings_NW.float()
        if self.normalise_input:
            x_NW = F.normalize(x_NW, dim=-1)  # x / max(|x|, 1e-12): a zero row stays zero
        x_NW = x_NW * self.input_factor
        if self.training and self.input_noise > 0:
            x_NW = x_NW + self.input_noise * (torch.randn_like(x_NW) if noise_NW is None else noise_NW)
        if isinstance(self.projection, nn.Linear):
            x_NW = x_NW.to(self.projection.weight.dtype)
        for block in self.blocks:
            x_NW = block(x_NW)
        return self.projection(self.norm(x_NW))
