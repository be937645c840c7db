"""Tiny random models of every tower family, each run by the library that it comes from, for
``scripts.towers_table``."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
IMAGE = 28  # pixels; 4 x 4 patches
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
SIZES |= {"image_size": IMAGE, "patch_size": 7}
MLP: dict[str, Any] = {"intermediate_size": 48}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a library computes for a few pictures, and the checkpoint that it computes it with."""

    library: str
    source: Path  # file or folder, for `llm2clip import`
    config: Path | None = None  # for --config
    pixels: Tensor  # (B, 3, S, S)
    states: Sequence[Tensor]  # (B, T, H) each: class token, if any, and patches
    pooled: Tensor | None  # (B, H); None: the library pools nothing


def randomize(model: nn.Module) -> Any:
    """Weights with a spread that shows a missing or exchanged tensor; scales near 1."""
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        is_scale = name.endswith("weight") and value.dim() == 1
        noise = torch.randn_like(value)
        with torch.no_grad():
            value.copy_(
                1 + 0.3 * noise if is_scale or "lambda" in name else 0.2 * noise
            )
    return model.eval()


def pictures(size: int = IMAGE) -> Tensor:
    """Two random pictures."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def run(model: Any, pixels: Tensor) -> tuple[list[Tensor], Any]:
    """All hidden states of a vision model of transformers, and its output."""
    with torch.no_grad():
        output = model(pixel_values=pixels, output_hidden_states=True)
    return list(output.hidden_states), output


def of_transformers(
    name: str, *, pooled: str = "pooler_output", **config: Any
) -> Callable[[Path], Reference]:
    """A maker for the vision model ``transformers.NAMEModel``. ``pooled``: "first" takes the first
    token of the last state, "mean" the mean of all."""

    def make(folder: Path) -> Reference:
        model_class = getattr(transformers, f"{name}Model")
        settings = model_class.config_class(**{**SIZES, **config})
        model = randomize(model_class(settings))
        model.save_pretrained(folder)
        pixels = pictures()
        states, output = run(model, pixels)
        last = output.last_hidden_state
        extra = states[0].shape[1] - 16  # tokens that are no patches
        kept = [0, *range(extra, extra + 16)] if extra else list(range(16))
        if pooled == "first":
            feature = last[:, 0]
        else:
            feature = last.mean(dim=1) if pooled == "mean" else output.pooler_output
        return Reference(
            library="transformers",
            source=folder,
            pixels=pixels,
            states=[state[:, kept] for state in states],
            pooled=feature,
        )

    return make


def naflex(folder: Path) -> Reference:
    """SigLIP 2 NaFlex, which transformers gives patches (B, N, 3 P P), their mask and grid."""
    sizes = {name: SIZES[name] for name in SIZES if name != "image_size"}
    settings = transformers.Siglip2VisionConfig(**sizes, **MLP, num_patches=16)
    model = randomize(transformers.Siglip2VisionModel(settings))
    model.save_pretrained(folder)
    pixels = pictures()
    squares = pixels.view(2, 3, 4, 7, 4, 7).permute(0, 2, 4, 3, 5, 1)
    inputs = {
        "pixel_values": squares.reshape(2, 16, -1),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    return Reference(
        library="transformers",
        source=folder,
        pixels=pixels,
        states=output.hidden_states,
        pooled=output.pooler_output,
    )


def qwen25_states(model: Any, pixels: Tensor) -> list[Tensor]:
    """States of transformers' Qwen2.5-VL vision model, which orders patches by window and by what
    it merges, with patches row by row: (B, T, H) each."""
    from transformers.vision_utils import get_vision_window_index

    side = model.config.patch_size
    merge = model.config.spatial_merge_size
    count = len(pixels)
    grid = pixels.shape[-1] // side
    half = grid // merge
    frames = torch.stack((pixels, pixels), dim=1)  # a still picture is two equal frames
    patches = frames.view(count, 2, 3, half, merge, side, half, merge, side)
    patches = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(count * grid**2, -1)
    grids = torch.tensor([[1, grid, grid]] * count)
    with torch.no_grad():
        output = model(patches, grids, output_hidden_states=True)
    order, _ = get_vision_window_index(grids, merge, model.config.window_size, side)
    back = torch.argsort(order)
    states = []
    for state in output.hidden_states:
        groups = state.unflatten(0, (-1, merge**2))[back]
        squares = groups.view(count, half, half, merge, merge, -1)
        states.append(squares.permute(0, 1, 3, 2, 4, 5).reshape(count, grid**2, -1))
    return states


def qwen25(folder: Path) -> Reference:
    """Qwen2.5-VL's tower, in windows of 4 x 4 of its 8 x 8 patches."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as module

    settings: Any = transformers.Qwen2_5_VLConfig().vision_config
    settings.update(
        {
            **{"depth": 3, "hidden_size": 32, "num_heads": 2, **MLP, "patch_size": 7},
            **{"window_size": 28, "fullatt_block_indexes": [1], "out_hidden_size": 16},
        }
    )
    model = randomize(module.Qwen2_5_VisionTransformerPretrainedModel(settings))
    folder.mkdir()
    state = {f"visual.{name}": v for name, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    body = {"model_type": "qwen2_5_vl", "vision_config": settings.to_dict()}
    (folder / "config.json").write_text(json.dumps(body))
    pixels = pictures(2 * IMAGE)
    return Reference(
        library="transformers",
        source=folder,
        pixels=pixels,
        states=qwen25_states(model, pixels),
        pooled=None,  # its merger projects to the language model
    )


def timm(folder: Path) -> Reference:
    """A vision transformer of timm with a class token, as its own folders on the Hub."""
    import timm as library
    from timm.models import save_for_hf

    arguments: dict[str, Any] = {"patch_size": 7, "embed_dim": 32, "depth": 3}
    arguments |= {"num_heads": 2, "img_size": IMAGE}
    name = "vit_base_patch16_224"
    model = randomize(library.create_model(name, num_classes=0, **arguments))
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    pixels = pictures()
    with torch.no_grad():
        tokens = model.patch_embed(pixels)
        tokens = torch.cat((model.cls_token.expand(2, -1, -1), tokens), dim=1)
        states = [tokens + model.pos_embed]
        for block in model.blocks:
            states.append(block(states[-1]))
        pooled = model(pixels)
    return Reference(
        library="timm",
        source=folder,
        pixels=pixels,
        states=[state[:, 1:] for state in states],
        pooled=pooled,
    )


def eva02(folder: Path) -> Reference:
    """States that EVA-CLIP's own code computed, which tests/golden holds with its weights."""
    stored = GOLDEN / "reference" / "A_vision_towers" / "eva02_l14"
    tensors = load_file(stored / "states.safetensors")
    names = [name for name in sorted(tensors) if name.startswith("block_")]
    return Reference(
        library="EVA-CLIP (stored)",
        source=stored / "weights.safetensors",
        config=stored / "config.json",
        pixels=tensors["pixels"],
        states=[tensors[name] for name in ("after_patch_embed_and_pos", *names)],
        pooled=tensors["pooled"],
    )


def openvision(folder: Path) -> Reference:
    """OpenVision's tower, by OpenCLIP; the norm of the patches' mean is pooled."""
    import open_clip

    vision: Any = {"image_size": IMAGE, "layers": 3, "width": 32, "patch_size": 7}
    vision |= {"head_width": 16, "mlp_ratio": 1.5, "norm_kwargs": {"eps": 1e-6}}
    vision |= {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
    text: Any = {
        "context_length": 8,
        "vocab_size": 40,
        "width": 16,
        "heads": 2,
        "layers": 1,
    }
    model = randomize(open_clip.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text))
    folder.mkdir()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    body = {"model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}}
    body["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps(body))
    pixels = pictures()
    visual: Any = model.visual
    states: list[Tensor] = []
    blocks = visual.transformer.resblocks
    for block in blocks:
        block.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    blocks[-1].register_forward_hook(lambda _, __, output: states.append(output))
    with torch.no_grad():
        visual(pixels)
        pooled = visual.ln_post(states[-1][:, 1:].mean(dim=1))
    return Reference(
        library="open_clip",
        source=folder,
        pixels=pixels,
        states=states,
        pooled=pooled,
    )


# family -> what makes its reference in a folder that does not exist yet
MAKERS: dict[str, Callable[[Path], Reference]] = {
    "aimv2": of_transformers("Aimv2Vision", **MLP, use_head=True),
    "clip": of_transformers("CLIPVision", **MLP),
    "dinov2": of_transformers("Dinov2", mlp_ratio=2),
    "dinov2_registers": of_transformers("Dinov2WithRegisters", mlp_ratio=2),
    "dinov3": of_transformers("DINOv3ViT", **MLP, num_register_tokens=3),
    "eva02": eva02,
    "internvl": of_transformers("InternVLVision", **MLP, pooled="first"),
    "metaclip2": of_transformers("MetaClip2Vision", **MLP),
    "mlcd": of_transformers("MLCDVision", **MLP),
    "naflex": naflex,
    "openvision": openvision,
    "qwen25": qwen25,
    "radio": of_transformers(
        "Radio", mlp_ratio=1.5, max_img_size=56, num_cls_tokens=3, pooled="first"
    ),
    "siglip": of_transformers("SiglipVision", **MLP),
    "timm": timm,
    "tipsv2": of_transformers("Tipsv2Vision", mlp_ratio=2),
}
