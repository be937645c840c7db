"""Tiny towers with random weights, saved and run by reference implementations, for
vision/test_towers_of_today.py.

    PYTHONPATH=. python tests/golden/make_towers_of_today.py

rewrites tests/golden/towers_of_today/NAME: a checkpoint as the reference library writes it, and
states.safetensors with ``pixels`` (2, 3, S, S), ``hidden_states_NN`` (2, T, H) of all tokens,
``last_hidden_state``, ``pooled`` (2, H), ``kept`` (the tokens that our towers' states have), and
``embedding`` (2, D), not normalized, where there is a projection. Written with transformers 5.24.0,
timm 1.0.31, open_clip 3.3.0, torch 2.13.0.
"""

import json
import shutil
from pathlib import Path

import open_clip
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from scripts.towers_references import qwen25_states

FOLDER = Path(__file__).parent / "towers_of_today"
SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
}
TEXT |= {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 8,
}
MLP = {"intermediate_size": 24}


def randomize(model: nn.Module) -> nn.Module:
    """Weights with a spread that shows a missing or exchanged tensor; norms near 1, biases not
    0."""
    for name, value in model.named_parameters():
        is_scale = (name.endswith("weight") and value.dim() == 1) or "lambda" in name
        with torch.no_grad():
            value.copy_(
                1 + 0.3 * torch.randn_like(value)
                if is_scale
                else 0.2 * torch.randn_like(value)
            )
    return model.eval()


def in_blocks(run, blocks: nn.ModuleList) -> tuple[list[Tensor], object]:
    """The input of every block and the output of the last one, and what ``run()`` returns."""
    states: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        for block in blocks
    ]
    hooks.append(
        blocks[-1].register_forward_hook(lambda _, __, output: states.append(output))
    )
    with torch.no_grad():
        output = run()
    for hook in hooks:
        hook.remove()
    return states, output


def write_states(
    name: str, pixels: Tensor, states: list[Tensor], kept: list[int], **more: Tensor
) -> None:
    tensors = {f"hidden_states_{i:02d}": state for i, state in enumerate(states)} | more
    tensors |= {"pixels": pixels, "kept": torch.tensor(kept)}
    save_file(
        {key: value.contiguous().clone() for key, value in tensors.items()},
        FOLDER / name / "states.safetensors",
    )


def of_transformers(
    name: str, model, tower, *, kept: list[int], pixels: Tensor, projection=None
) -> None:
    """A model of transformers with ``tower`` in it."""
    model.save_pretrained(FOLDER / name)
    encoder = tower.encoder if hasattr(tower, "encoder") else tower.model
    blocks = encoder.layer if hasattr(encoder, "layer") else encoder.layers
    states, output = in_blocks(lambda: tower(pixel_values=pixels), blocks)
    more = {"last_hidden_state": output.last_hidden_state}
    if getattr(output, "pooler_output", None) is not None:
        more["pooled"] = output.pooler_output
    if projection is not None:
        more["embedding"] = projection(more["pooled"]).detach()
    write_states(name, pixels, states, kept, **more)


def aimv2(pixels: Tensor) -> None:
    patches = list(range(16))
    for name, options in {"aimv2": {}, "aimv2_native": {"is_native": True}}.items():
        config = transformers.Aimv2VisionConfig(
            **SIZE, **MLP, use_head=False, **options
        )
        tower = randomize(transformers.Aimv2VisionModel(config))
        of_transformers(name, tower, tower, kept=patches, pixels=pixels)
    text = {
        key: value
        for key, value in TEXT.items()
        if key not in ("bos_token_id", "pad_token_id")
    }
    config = transformers.Aimv2Config(
        vision_config={**SIZE, **MLP}, text_config=text, projection_dim=12
    )
    model = randomize(transformers.Aimv2Model(config))
    of_transformers(
        "aimv2_lit",
        model,
        model.vision_model,
        kept=patches,
        pixels=pixels,
        projection=model.visual_projection,
    )


def dinov3(pixels: Tensor) -> None:
    config = transformers.DINOv3ViTConfig(**SIZE, **MLP, num_register_tokens=3)
    model = randomize(transformers.DINOv3ViTModel(config))
    file = FOLDER / "dinov3" / "model.safetensors"
    of_transformers("dinov3", model, model, kept=[0, *range(4, 20)], pixels=pixels)
    state = {
        key.removeprefix("model."): value for key, value in load_file(file).items()
    }
    save_file(state, file, {"format": "pt"})  # as on the Hub: layer.0.norm1.weight


def metaclip2(pixels: Tensor) -> None:
    config = transformers.MetaClip2Config(
        vision_config={**SIZE, **MLP}, text_config=TEXT, projection_dim=12
    )
    model = randomize(transformers.MetaClip2Model(config))
    kept = list(range(17))
    of_transformers(
        "metaclip2",
        model,
        model.vision_model,
        kept=kept,
        pixels=pixels,
        projection=model.visual_projection,
    )


def radio(pixels: Tensor) -> None:
    config = transformers.RadioConfig(
        **SIZE, mlp_ratio=1.5, max_img_size=56, num_cls_tokens=3, num_registers=4
    )
    model = randomize(transformers.RadioModel(config))
    kept = [0, *range(7, 23)]
    of_transformers("radio", model, model, kept=kept, pixels=pixels.sigmoid())
    json.dump(
        {"do_normalize": False, "image_mean": [0.5, 0.5, 0.5]},
        open(FOLDER / "radio/preprocessor_config.json", "w"),
    )


def perception_encoder(pixels: Tensor) -> None:
    arguments = {
        "patch_size": 7,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "attn_pool_num_heads": 2,
    }
    arguments |= {
        "img_size": 28,
        "mlp_ratio": 1.5,
        "attn_pool_mlp_ratio": 1.5,
        "ref_feat_shape": [4, 4],
    }
    model = randomize(
        timm.create_model("vit_pe_core_base_patch16_224", num_classes=0, **arguments)
    )
    save_for_hf(
        model, FOLDER / "pe_core", model_args=arguments, safe_serialization=True
    )
    states, output = in_blocks(lambda: model.forward_features(pixels), model.blocks)
    with torch.no_grad():
        pooled = model.forward_head(output, pre_logits=True)
    write_states(
        "pe_core",
        pixels,
        states,
        list(range(1, 17)),
        last_hidden_state=output,
        pooled=pooled,
    )


def openvision(pixels: Tensor) -> None:
    vision = {
        "image_size": 28,
        "layers": 2,
        "width": 16,
        "patch_size": 7,
        "head_width": 8,
        "mlp_ratio": 1.5,
    }
    vision |= {
        "no_ln_pre": True,
        "pool_type": "avg",
        "final_ln_after_pool": True,
        "norm_kwargs": {"eps": 1e-6},
    }
    text = {
        "context_length": 8,
        "vocab_size": 40,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "no_causal_mask": True,
    }
    model = randomize(open_clip.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text))
    folder = FOLDER / "openvision"
    folder.mkdir()
    save_file(
        {k: v.contiguous().clone() for k, v in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    preprocess = {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
    }
    config = {
        "model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": preprocess,
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    states, embedding = in_blocks(
        lambda: model.visual(pixels), model.visual.transformer.resblocks
    )
    write_states("openvision", pixels, states, list(range(17)), embedding=embedding)


def dinov2_registers(pixels: Tensor) -> None:
    config = transformers.Dinov2WithRegistersConfig(
        **SIZE, mlp_ratio=2, num_register_tokens=3
    )
    model = randomize(transformers.Dinov2WithRegistersModel(config))
    of_transformers(
        "dinov2_registers", model, model, kept=[0, *range(4, 20)], pixels=pixels
    )


def tipsv2(pixels: Tensor) -> None:
    text = {key: value for key, value in TEXT.items() if not key.endswith("_token_id")}
    config = transformers.Tipsv2Config(
        vision_config={**SIZE, "mlp_ratio": 1.5}, text_config=text
    )
    model = randomize(transformers.Tipsv2Model(config))
    with torch.no_grad():
        model.temperature.fill_(0.05)
    kept = [0, *range(2, 18)]
    unit = nn.Identity()  # the pooled output is the embedding
    of_transformers(
        "tipsv2",
        model,
        model.vision_model,
        kept=kept,
        pixels=pixels.sigmoid(),
        projection=unit,
    )


def internvl(pixels: Tensor) -> None:
    config = transformers.InternVLVisionConfig(
        **SIZE, **MLP, attention_bias=True, use_qk_norm=True
    )
    model = randomize(transformers.InternVLVisionModel(config))
    of_transformers("internvl", model, model, kept=list(range(17)), pixels=pixels)


def qwen25(pixels: Tensor) -> None:
    """In windows of 2 x 2 patches; as a folder of the whole model without the language model."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as module

    settings = transformers.Qwen2_5_VLConfig().vision_config
    settings.update(
        {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 7, **MLP}
    )
    settings.update(
        {"window_size": 14, "fullatt_block_indexes": [1], "out_hidden_size": 8}
    )
    model = randomize(module.Qwen2_5_VisionTransformerPretrainedModel(settings))
    folder = FOLDER / "qwen25"
    folder.mkdir()
    state = {f"visual.{name}": value for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    # of any size; without this one it would be imported for 448 pixels
    vision = {**settings.to_dict(), "image_size": 28}
    body = {"model_type": "qwen2_5_vl", "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(body, indent=2))
    states = qwen25_states(model, pixels)
    more = {"last_hidden_state": states[-1], "pooled": states[-1].mean(1)}
    write_states("qwen25", pixels, states, list(range(16)), **more)


MAKERS = (
    *(aimv2, dinov3, metaclip2, radio, perception_encoder, openvision),
    *(dinov2_registers, tipsv2, internvl, qwen25),
)

if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for number, make in enumerate(MAKERS):
        torch.manual_seed(number)
        make(torch.randn(2, 3, 28, 28))
