"""SigLIP 2 NaFlex as a tower that also takes squares: that of transformers 5; in transformers 4 a
SigLIP with another configuration, for squares alone.

Shapes: B images, N patches, g side of the position table, H width, P side of a patch and S of an
image in pixels.
"""

import math
import sys
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn


def naflex_positions(
    table: Tensor, spatial_shapes: Tensor | None, max_length: int
) -> Tensor:
    """(g, g, H) positions -> (B, max_length, H) of images of ``spatial_shapes`` (B, 2), row by row,
    or (1, max_length, H) of a square: bilinear with antialias. Transformers' own makes the host
    wait for a GPU to check the shapes."""
    if spatial_shapes is None:
        side = math.isqrt(max_length)
        grid = table.permute(2, 0, 1)[None]
        if side != len(table):
            grid = nn.functional.interpolate(
                grid.float(), (side, side), mode="bilinear", antialias=True
            )
        return grid.to(table.dtype).flatten(2).mT
    fits = (spatial_shapes > 0).all() & (spatial_shapes.prod(1) <= max_length).all()
    torch._assert_async(
        fits, "spatial_shapes: an image has no patches, or more than pixel_values"
    )
    size_B12 = spatial_shapes.float()[:, None]  # rows and columns of an image
    columns_B11 = size_B12[..., 1:]
    index_N1 = torch.arange(max_length, device=table.device)[:, None]
    row_BN1 = index_N1.div(columns_B11, rounding_mode="floor")
    column_BN1 = index_N1 - row_BN1 * columns_B11
    place_BN2 = torch.cat((row_BN1, column_BN1), dim=2)
    # else far away, where no weight is above 0
    is_outside_BN1 = index_N1 >= size_B12.prod(2, keepdim=True)
    place_BN2 = place_BN2.masked_fill(is_outside_BN1, 0)
    # of the table's rows and columns: where a patch's center is, and how much they weigh there
    scale_B12 = len(table) / size_B12
    center_BN2 = (place_BN2 + 0.5) * scale_B12 - 0.5
    source_g = torch.arange(len(table), device=table.device)
    distance_BN2g = (source_g - center_BN2[..., None]).abs()
    reach_B121 = scale_B12.clamp(min=1)[..., None]
    weight_BN2g = (1 - distance_BN2g / reach_B121).clamp(min=0)
    weight_BN2g = weight_BN2g / weight_BN2g.sum(3, keepdim=True)
    row_BNg, column_BNg = weight_BN2g.unbind(2)
    weight_BNG = (row_BNg[..., None] * column_BNg[..., None, :]).flatten(2)
    return (weight_BNG @ table.flatten(0, 1).float()).to(table.dtype)


def siglip_tensor(name: str, weight: Tensor, patch: int, grid: int) -> Tensor:
    """A tensor of NaFlex as that of the SigLIP that computes the same of squares of ``grid`` x
    ``grid`` patches: the linear layer over a patch (rows, columns, channels) is a convolution, the
    positions are the square's."""
    if name.endswith("patch_embedding.weight") and weight.dim() == 2:
        return weight.unflatten(1, (patch, patch, -1)).permute(0, 3, 1, 2)
    if name.endswith("position_embedding.weight"):
        table = weight.unflatten(0, (math.isqrt(len(weight)), -1))
        return naflex_positions(table, None, grid**2)[0]
    return weight


if int(transformers.__version__.split(".")[0]) < 5:

    class SquareNaflexConfig(transformers.SiglipVisionConfig):
        """The vision configuration of NaFlex, or of an image-text model, as SigLIP's for a square;
        see below."""

        model_type = "siglip2_vision_model"

        def __init__(
            self,
            num_patches: int = 256,
            patch_size: int = 16,
            image_size: int = 0,
            **kwargs: Any,
        ) -> None:
            side = image_size or math.isqrt(num_patches) * patch_size
            super().__init__(patch_size=patch_size, image_size=side, **kwargs)
            self.num_patches = num_patches

        @classmethod
        def from_pretrained(cls, directory: Any, **kwargs: Any) -> Any:
            fields, rest = cls.get_config_dict(directory, **kwargs)
            return cls.from_dict(fields.get("vision_config", fields), **rest)

    class SquareNaflexTower(transformers.SiglipVisionModel):
        """SigLIP 2 NaFlex of squares alone, in versions of transformers without it, such as
        LLaVA's."""

        config_class = SquareNaflexConfig

        @classmethod
        def from_pretrained(
            cls, directory: Any, *, torch_dtype: Any = None, **kwargs: Any
        ) -> Any:
            """See PreTrainedModel; ``directory``: with model.safetensors."""
            from safetensors.torch import load_file

            config = SquareNaflexConfig.from_pretrained(directory)
            patch = config.patch_size
            grid = config.image_size // patch
            state: dict[str, Tensor] = {}
            for name, weight in load_file(f"{directory}/model.safetensors").items():
                state[name] = siglip_tensor(name, weight, patch, grid).contiguous()
            return super().from_pretrained(
                None, config=config, state_dict=state, torch_dtype=torch_dtype, **kwargs
            )

        def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
            """Raises ValueError: its tensors are SigLIP's."""
            raise ValueError(
                f"SigLIP 2 NaFlex is not written by transformers {transformers.__version__}; "
                "upgrade to 5"
            )

        def forward(
            self,
            pixel_values: Any,
            *args: Any,
            spatial_shapes: Any = None,
            **kwargs: Any,
        ) -> Any:
            """See SiglipVisionModel. Raises ValueError for images that keep their aspect."""
            if spatial_shapes is not None:
                raise ValueError(
                    f"NaFlex takes squares alone in transformers {transformers.__version__}; "
                    "upgrade to 5"
                )
            return super().forward(pixel_values, *args, **kwargs)

else:
    # a mask (B, 1, 1, N) is added as it is; one of two dimensions, which transformers 5.0 needs, is
    # read by the host
    TAKES_ADDED_MASK = hasattr(
        sys.modules[transformers.Siglip2VisionModel.__module__],
        "create_bidirectional_mask",
    )
    # the pooling head takes (B, N), true for patches; before, what the encoder takes
    HEAD_TAKES_PATCHES = Version(transformers.__version__) >= Version("5.25")

    def patches_for_head(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The pooling head's states and mask, with a mask (B, 1, 1, N) that is added as (B, N),
        true for patches."""
        states, mask = inputs
        if mask is not None and mask.dim() == 4:
            mask = (mask == 0)[:, 0, 0]
        return states, mask

    class NaflexTowerConfig(transformers.Siglip2VisionConfig):
        """``image_size``: side in pixels of the square of as many patches as an image may have; by
        default its position table's, ``num_patches``."""

        keeps_aspect = True

        def __post_init__(self, **kwargs: Any) -> None:
            super().__post_init__(**kwargs)
            side = math.isqrt(self.num_patches) * self.patch_size
            self.image_size = getattr(self, "image_size", 0) or side

        def to_diff_dict(self) -> dict[str, Any]:
            """See PretrainedConfig; the two sizes are always in it."""
            return super().to_diff_dict() | {
                "image_size": self.image_size,
                "num_patches": self.num_patches,
            }

    class NaflexTower(transformers.Siglip2VisionModel):
        """SigLIP 2 NaFlex that also takes squares of pixels, as other towers do."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            embeddings: Any = self.embeddings
            embeddings.resize_positional_embeddings = naflex_positions
            if HEAD_TAKES_PATCHES and self.use_head:
                self.head.register_forward_pre_hook(patches_for_head)

        def forward(
            self,
            pixel_values: Any,
            pixel_attention_mask: Any = None,
            spatial_shapes: Any = None,
            output_hidden_states: bool | None = None,
            return_dict: bool | None = None,
            **_: Any,
        ) -> Any:
            """Patches (B, N, 3 P P) with their mask and shapes, as of Siglip2ImageProcessor, or
            pixels (B, 3, S, S): with ``spatial_shapes`` (B, 2) an image's rows x columns patches,
            row by row, without it a square image.
            """
            if pixel_values.dim() == 4:
                side = self.config.patch_size
                # (B, 3, g, P, g, P)
                patches = pixel_values.unflatten(3, (-1, side)).unflatten(2, (-1, side))
                pixel_values = (
                    patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
                )
            if spatial_shapes is not None and pixel_attention_mask is None:
                device = pixel_values.device
                positions = torch.arange(pixel_values.shape[1], device=device)
                is_patch_BN = positions < spatial_shapes.prod(1, keepdim=True)
                if TAKES_ADDED_MASK:
                    is_padding_B11N = (~is_patch_BN)[:, None, None].to(self.dtype)
                    lowest = torch.finfo(self.dtype).min
                    pixel_attention_mask = is_padding_B11N * lowest
                else:
                    pixel_attention_mask = is_patch_BN.int()
            inputs: Any = {
                "pixel_attention_mask": pixel_attention_mask,
                "spatial_shapes": spatial_shapes,
            }
            output: Any = super().forward(
                pixel_values, **inputs, output_hidden_states=output_hidden_states
            )
            return output if return_dict is not False else output.to_tuple()
