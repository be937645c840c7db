"""Load a vision tower, resize it, and name the parts that training and export need.

Every tower is a Hugging Face vision model: ``pixel_values`` (B, 3, S, S) in; ``last_hidden_state``,
``pooler_output`` and, with ``output_hidden_states=True``, ``hidden_states`` out. The states mean
the same in every family: blocks + 1 tensors (B, T, H), the first one the input of the first block,
the others the outputs of the blocks before any final norm; the class token, if there is one, comes
first.
"""

import copy
import functools
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.quiet import quiet_transformers
from llm2clip_plugin.vision.directory import (
    ADAPTER_FILE,
    INHERITED,
    PREPROCESSOR_FILE,
    WEIGHTS_FILE,
    check_hash,
    fetch_directory,
    own_preprocessor,
    read_tensor,
    read_tensors,
    weight_files,
)
from llm2clip_plugin.vision.families import (
    Family,
    Tower,
    families,
    family_of,
    read_config,
)

TIMM_PREFIX = "timm:"


def load_tower(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    revision: str | None = None,
) -> Tower:
    """A vision model from a tower directory, a plain Hugging Face directory, a Hub id or
    ``timm:NAME``, in eval mode.

    ``dtype`` applies whatever the file's is: transformers 4 reads half precision as float32,
    transformers 5 does not. ``image_size``, in pixels, interpolates the positions once if it is not
    the source's own (see ``resize_tower``); the forward pass then rejects images of any other size.
    Raises FileNotFoundError (no such source), ValueError (unknown family), ContractError (weights
    that don't match the config: names every missing, unexpected or misshapen tensor; a tower
    directory that differs from its card).
    """
    if str(source).startswith(TIMM_PREFIX):
        tower = timm_tower(str(source).removeprefix(TIMM_PREFIX)).to(dtype)
    else:
        tower = _load_directory(fetch_directory(source, revision=revision), dtype)
    check_calls(tower)
    if image_size is not None and image_size != tower.config.image_size:
        tower = resize_tower(tower, image_size)
    return tower


def pretrained_log_scale(source: str | os.PathLike[str]) -> float | None:
    """The natural logarithm of a ``load_tower`` source's logit scale; None if it has none."""
    if str(source).startswith(TIMM_PREFIX):
        return None
    directory = fetch_directory(source)
    files = weight_files(directory)
    if (directory / ADAPTER_FILE).is_file():
        files = [directory / ADAPTER_FILE]
    for file in files:
        scale = read_tensor(file, "logit_scale")
        if scale is not None:
            return float(scale)
    return None


def initial_log_scale(source: str | os.PathLike[str], tower: Tower) -> float:
    """``pretrained_log_scale``, else the family's, of which a note is printed: vision-only folders
    have none, though the authors' code reads one (near 100) from OpenAI's and EVA02's."""
    log_scale = pretrained_log_scale(source)
    if log_scale is not None:
        return log_scale
    family = family_of(tower)
    print_once(
        f"note: {source} has no logit scale; training starts at {family.scale:.4g}, the default of "
        f"the family {family.name!r}; --dual.logit-scale-init sets its natural logarithm"
    )
    return math.log(family.scale)


def _load_directory(directory: Path, dtype: torch.dtype) -> Tower:
    """The tower in a directory, with every tensor of its file used and none missing."""
    family, _ = read_config(directory)
    if not any(directory.glob("model*.safetensors")):
        for path in sorted(directory.glob("pytorch_model*.bin")):
            # refuses a pickle that runs code, or is not safe to read
            read_tensors(path)
    check_hash(directory, WEIGHTS_FILE)
    from_pretrained = family.vision_class().from_pretrained
    read = functools.partial(
        from_pretrained, directory, torch_dtype=dtype, output_loading_info=True
    )
    with (
        errors_about(f"the tower in {directory}", fix="copy or export it again"),
        quiet_transformers(),
    ):
        try:
            tower, info = read()
        except RuntimeError:
            # misshapen tensors, which transformers lists only with ignore_mismatched_sizes
            # not at once: under ZeRO-3 all parameters are empty
            tower, info = read(ignore_mismatched_sizes=True)
    _check_loading(directory, family, info)
    tower.own_preprocessor = own_preprocessor(directory)
    note_default_normalization(directory, tower, family)
    return tower


def _check_loading(directory: Path, family: Family, info: dict[str, Any]) -> None:
    """ContractError for a tensor of the tower that is missing, not expected or has another shape;
    ``info``: transformers' ``output_loading_info``."""
    unexpected: list[str] = []
    for name in sorted(info["unexpected_keys"]):
        # old files on the Hub contain position_ids: a counter, not a weight
        is_counter = name.endswith("embeddings.position_ids")
        if not is_counter and not name.startswith(family.not_tower):
            unexpected.append(name)
    misshapen: dict[str, str] = {}
    for name, actual, expected in info["mismatched_keys"]:
        misshapen[name] = f"{name} is {tuple(actual)}, expected {tuple(expected)}"
    missing = sorted(set(info["missing_keys"]) - set(misshapen))
    if missing or unexpected or misshapen:
        shapes = [misshapen[name] for name in sorted(misshapen)]
        raise ContractError(
            f"the weights in {directory} do not match its config.json: missing {missing}, "
            f"unexpected {unexpected}, misshapen {shapes}"
        )


@functools.lru_cache
def print_once(text: str) -> None:
    """On stderr, by rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def note_default_normalization(directory: Path, tower: Tower, family: Family) -> None:
    """Print a note if neither the tower's own file nor its config.json says how pixels are
    normalized."""
    stated = {**tower.config.to_dict(), **tower.own_preprocessor}
    if not (stated.get("image_mean") and stated.get("image_std")):
        missing = PREPROCESSOR_FILE
        if (directory / PREPROCESSOR_FILE).is_file():
            missing = "image_mean and image_std"
        taken = f"mean {list(family.mean)} and standard deviation {list(family.std)}"
        print_once(
            f"note: {directory} has no {missing}; pixels get the {taken} of the family "
            f"{family.name!r}"
        )


def resize_tower(tower: Tower, image_size: int) -> Tower:
    """A copy of a tower for another image size in pixels, with interpolated positions.

    ``config.resized_from`` records the size that the positions were learned at, for the card.
    Raises ValueError if the size is not a multiple of the patch size.
    """
    family = family_of(tower)
    config = copy.deepcopy(tower.config)
    check_size(config, image_size)
    old_size = config.image_size
    config.image_size = image_size
    config.resized_from = resized_from(tower) or old_size
    state = tower.state_dict()
    name = core_prefix(tower) + family.positions
    rows = config.to_dict().get("position_class_rows", int(family.has_cls))
    # some timm models have no table, or interpolate it
    if family.positions and name in state and rows >= 0:
        old_grid = old_size // config.patch_size
        new_grid = image_size // config.patch_size
        state[name] = resize_positions(
            state[name], class_rows=rows, old_grid=old_grid, new_grid=new_grid
        )
    resized = type(tower)(config).to(device=tower.device, dtype=tower.dtype)
    try:
        resized.load_state_dict(state)
    except RuntimeError as error:
        message = (
            f"{config.model_type} cannot be resized by interpolating its position table alone: "
            f"{error}"
        )
        raise ValueError(message) from error
    check_calls(resized)
    resized.own_preprocessor = getattr(tower, "own_preprocessor", {})
    return resized.train(tower.training)


def resize_positions(
    table: Tensor, *, class_rows: int, old_grid: int, new_grid: int
) -> Tensor:
    """Interpolate the patch rows and keep the class rows: (..., c + g*g, C) -> (..., c + G*G, C).

    Bicubic without antialias, in float32, as LLM2CLIP's reference does from 224 to 336 pixels, and
    transformers 5 for DINOv2. Raises ValueError if the number of rows does not match ``old_grid``.
    """
    rows = table.shape[-2]
    if rows != class_rows + old_grid**2:
        raise ValueError(
            f"the position table has {rows} rows, expected {class_rows} + {old_grid} x {old_grid}"
        )
    if new_grid == old_grid:
        return table
    flat = table.reshape(rows, table.shape[-1])
    patches = rearrange(flat[class_rows:].float(), "(h w) c -> 1 c h w", h=old_grid)
    patches = F.interpolate(
        patches, size=(new_grid, new_grid), mode="bicubic", align_corners=False
    )
    patches = rearrange(patches, "1 c h w -> (h w) c").to(table.dtype)
    resized = torch.cat((flat[:class_rows], patches))
    return resized.reshape(*table.shape[:-2], *resized.shape)


def check_calls(tower: Tower) -> None:
    """Let every forward pass compare the images with the tower's size, and the states with the
    images; ValueError."""
    tower.register_forward_pre_hook(_check_images, with_kwargs=True)
    tower.register_forward_hook(_check_states, with_kwargs=True)


def _check_images(tower: Tower, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """DINOv2 would interpolate its positions silently, and differently in each version of
    transformers."""
    pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
    side = tower.config.image_size
    if pixels.dim() == 3 and getattr(tower.config, "keeps_aspect", False):  # patches
        if "spatial_shapes" not in kwargs:
            raise ValueError(
                f"patches {tuple(pixels.shape)} require spatial_shapes=..., as of the same "
                "processor"
            )
    elif pixels.shape[-2:] != (side, side):
        sizes = (
            f"{tuple(pixels.shape[-2:])} pixels, but the tower expects {side} x {side}"
        )
        raise ValueError(
            f"images have {sizes}; interpolate its positions with load_tower(..., image_size=N)"
        )


def _check_states(
    tower: Tower, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """A state with another number of tokens has no class token, or one that its family does not
    know of: every patch would be taken for its neighbor."""
    pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
    if pixels.dim() == 3:
        patches = pixels.shape[1]
    else:
        height, width = pixels.shape[-2:]
        rows = height // tower.config.patch_size
        columns = width // tower.config.patch_size
        patches = rows * columns
    class_tokens = int(family_of(tower).has_cls)
    for number, state in enumerate(getattr(output, "hidden_states", None) or ()):
        if state.shape[1] != class_tokens + patches:
            raise ValueError(
                f"hidden state {number} of {type(tower).__name__} has {state.shape[1]} tokens, "
                f"expected {class_tokens} class tokens and {patches} patches: "
                "its blocks see other tokens than the family's states leave out"
            )


def check_size(config: Any, image_size: int) -> None:
    """ValueError if ``image_size`` is not a multiple of the patch size."""
    if image_size % config.patch_size:
        size = image_size // config.patch_size * config.patch_size
        raise ValueError(
            f"image_size {image_size} is not a multiple of the patch size {config.patch_size}; try "
            f"{size}"
        )


def resized_from(tower: Tower) -> int:
    """The image size that the tower's positions were learned at if they were interpolated, else
    0."""
    return tower.config.to_dict().get("resized_from", 0)


def preprocessor_config(
    source: Tower | str | os.PathLike[str], *, square: bool = False
) -> dict[str, Any]:
    """preprocessor_config.json for a tower or a tower directory.

    Mean, standard deviation and resampling are those of the source's own file or configuration,
    else the family's; the crop is the tower's image size, because SigLIP's and DINOv2's own files
    have no ``crop_size`` or another size. ``square``: images are cropped whatever the family, as
    LLaVA needs them.
    """
    if isinstance(source, nn.Module):
        tower: Tower = source
        family = family_of(tower)
        config = tower.config
        stated = getattr(tower, "own_preprocessor", {})
    else:
        directory = fetch_directory(source)
        family, config = read_config(directory)
        stated = own_preprocessor(directory)
    inherited: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name in INHERITED and value:
            inherited[name] = value
    stated = {**inherited, **stated}
    size = config.image_size
    processor: dict[str, Any] = {
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "crop_size": {"height": size, "width": size},
        "image_mean": list(stated.get("image_mean", family.mean)),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(stated.get("image_std", family.std)),
        "resample": stated.get("resample", family.resample),
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
    if getattr(config, "keeps_aspect", False) and not square:
        # which ignores the square
        processor["image_processor_type"] = "Siglip2ImageProcessor"
        processor["patch_size"] = config.patch_size
        processor["max_num_patches"] = (size // config.patch_size) ** 2
    return processor


def tower_in(model: Any) -> Tower:
    """The tower of a dual encoder, or the model itself if it is a tower."""
    return model.tower if "tower" in dict(model.named_children()) else model


def core_prefix(tower: Tower) -> str:
    """``"vision_model."`` where transformers wraps the tower (CLIP and SigLIP in 4.x), else
    ``""``."""
    return "vision_model." if "vision_model" in dict(tower.named_children()) else ""


def tower_blocks(tower: Tower) -> nn.ModuleList:
    """The transformer blocks, first to last."""
    return tower.get_submodule(core_prefix(tower) + family_of(tower).blocks)


def parameters_in(tower: Tower, names: Iterable[str]) -> list[nn.Parameter]:
    """The parameters that ``names`` (of modules or parameters, without ``core_prefix``) stand
    for."""
    full_names = tuple(core_prefix(tower) + name for name in names)
    prefixes = tuple(f"{name}." for name in full_names)
    parameters: list[nn.Parameter] = []
    for name, parameter in tower.named_parameters():
        if name in full_names or name.startswith(prefixes):
            parameters.append(parameter)
    return parameters


def tower_embeddings_parameters(tower: Tower) -> list[nn.Parameter]:
    """The parameters below the first block: patch projection, positions, class token, a norm before
    the blocks."""
    return parameters_in(tower, family_of(tower).embeddings)


def final_norm(tower: Tower) -> nn.Module:
    """The norm after the last block; the identity of a family without one."""
    name = family_of(tower).final_norm
    return tower.get_submodule(core_prefix(tower) + name) if name else nn.Identity()


def use_fastest_attention(tower: Tower, device: torch.device, *, bf16: bool) -> None:
    """Use eager attention in bf16 on a CPU, and otherwise keep the fused one that transformers
    chose.

    In bf16 on a CPU the backward pass of torch 2.13's fused kernel takes two to four times as long
    as plain matrix products for 17 to 200 tokens; the values differ only by rounding.
    """
    if device.type == "cpu" and bf16 and getattr(tower, "_supports_sdpa", False):
        tower.set_attn_implementation("eager")


def freeze_tower(tower: Tower, *, first_blocks: int | None = None) -> None:
    """Stop gradients for all of the tower, or for its embeddings and its first blocks; ValueError
    if it has fewer."""
    if first_blocks is None:
        tower.requires_grad_(False)
        return
    blocks = tower_blocks(tower)
    if not 0 <= first_blocks <= len(blocks):
        raise ValueError(
            f"cannot freeze the first {first_blocks} blocks: the tower has {len(blocks)}"
        )
    if first_blocks:
        for parameter in tower_embeddings_parameters(tower):
            parameter.requires_grad_(False)
    for block in blocks[:first_blocks]:
        block.requires_grad_(False)


# QuickGELU for training: bit-equal to transformers', with less memory and a faster backward pass.

FACTOR = 1.702


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(FACTOR * x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, FACTOR * x)


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return _QuickGELU.apply(x)  # pyright: ignore[reportReturnType]


def use_quick_gelu(tower: nn.Module) -> int:
    """Replace every QuickGELUActivation of transformers in ``tower``, in place; returns their
    number."""
    from transformers.activations import QuickGELUActivation

    count = 0
    for module in tower.modules():
        for name, child in module.named_children():
            if isinstance(child, QuickGELUActivation):
                setattr(module, name, QuickGELU())
                count += 1
    return count


# A tower of a known architecture without a checkpoint: on torch's meta device for plans, or with
# random weights.


def new_tower(
    source: str, *, image_size: int | None = None, device: str = "cpu"
) -> Tower:
    """A tower with the random weights that its library gives it, from torch's generator, in
    float32; none on "meta".

    ``source``: a tower directory (its config.json), one of the families' ``shapes``, or
    ``timm:NAME``. Raises ValueError for anything else, FileNotFoundError for a directory without
    config.json.
    """
    if source.startswith(TIMM_PREFIX):
        # not built on the meta device: timm reads the rates of stochastic depth from tensors while
        # it builds a model
        tower = timm_tower(source.removeprefix(TIMM_PREFIX), pretrained=False)
        if image_size and image_size != tower.config.image_size:
            tower = resize_tower(tower, image_size)
        return tower.to(device)
    shapes: dict[str, tuple[Family, dict[str, Any]]] = {}
    for family in families().values():
        for name, shape in family.shapes.items():
            shapes[name] = (family, shape)
    directory = Path(source).expanduser()
    if directory.is_dir():
        family, config = read_config(directory)
    elif source in shapes:
        family, shape = shapes[source]
        config = family.vision_class().config_class(**shape)
    else:
        raise ValueError(
            f"{source!r} is no tower directory or architecture; known: {', '.join(shapes)}, "
            "timm:NAME"
        )
    if image_size:
        check_size(config, image_size)
        config.image_size = image_size
    with torch.device(device):
        return family.vision_class()(config)


Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def eval_mode(model: Model) -> Iterator[Model]:
    """``model`` in eval mode; each submodule's mode is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training


# LoRA on a tower (PEFT): low-rank updates of the blocks' Linears train, the tower's own weights are
# frozen.


def add_lora(tower: Tower, *, rank: int, alpha: int) -> None:
    """Add LoRA layers to every Linear of the tower's blocks, in place; the tower's own weights are
    frozen.

    The update of a weight is ``alpha / rank * B @ A``; B starts at zero. Raises ValueError if PEFT
    is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("LoRA on the tower requires PEFT: pip install peft") from error
    in_blocks = {id(module) for module in tower_blocks(tower).modules()}
    linears: list[str] = []
    for name, module in tower.named_modules():
        if isinstance(module, nn.Linear) and id(module) in in_blocks:
            linears.append(name)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=linears, bias="none")
    inject_adapter_in_model(config, tower)
    tower.train(tower.training)  # PEFT creates its layers in training mode


def merged(model: nn.Module) -> nn.Module:
    """A copy with all LoRA updates merged into the weights; the model itself if it has none."""
    if not any(".lora_A." in name for name, _ in model.named_parameters()):
        return model
    from peft.tuners.lora import LoraLayer

    model = copy.deepcopy(model)
    layers: dict[str, LoraLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layers[name] = module
    for name, layer in layers.items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model


# Any timm vision transformer as a tower: ``load_tower("timm:vit_base_patch16_224")``. Needs timm
# 1.0 or newer.


def timm_tower(
    name: str, *, pretrained: bool = True, arguments: Mapping[str, Any] | None = None
) -> Tower:
    """A tower from a timm name, at its native size; ValueError unless it is a plain vision
    transformer."""
    timm_class = families()["timm"].vision_class()
    tower = timm_class.from_timm(name, pretrained=pretrained, arguments=arguments or {})
    return tower.eval()
