"""OpenCLIP and timm checkpoints, made by those libraries themselves (training environment)."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llm2clip_plugin import load_dual_encoder, load_tower
from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.convert.importing import import_tower

from .conftest import REFERENCE, largest_difference, read

open_clip = pytest.importorskip("open_clip", reason="open_clip is not part of LLaVA's environment")
TOLERANCE = 2e-5
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """No parameter at zero or one, so that a swap of two shows."""
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + (0.7 if parameter.dim() == 1 else 0)
    return model.eval()


def save_as_on_the_hub(model, fields, folder) -> None:
    folder.mkdir()
    save_file(
        {k: v.contiguous().clone() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    config = {"model_cfg": fields, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_clip(quick_gelu, tmp_path):
    vision = {"image_size": 28, "patch_size": 7, "width": 64, "layers": 2, "head_width": 16}
    fields = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT, "quick_gelu": quick_gelu}
    model = randomised(open_clip.CLIP(**{k: fields[k] for k in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")}))
    save_as_on_the_hub(model, fields, tmp_path / "hub")
    card, report = import_tower(tmp_path / "hub", tmp_path / "tower")
    assert card.family == "clip" and any("text tower, replaced by the LLM" in line for line in report)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = model.encode_image(pixels, normalize=True)
        assert largest_difference(load_dual_encoder(tmp_path / "tower").encode_image(pixels), expected) < TOLERANCE
    written = json.loads((tmp_path / "tower" / "preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.1, 0.2, 0.3]


def test_a_clip_with_its_own_text_tower_needs_its_projection(tmp_path):
    vision = {"image_size": 28, "patch_size": 7, "width": 64, "layers": 1, "head_width": 16}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=TEXT)
    save_as_on_the_hub(model, {"vision_cfg": vision}, tmp_path / "hub")
    import_tower(tmp_path / "hub", tmp_path / "whole")
    del model.visual.proj
    (tmp_path / "hub" / "open_clip_model.safetensors").unlink()
    save_file(dict(model.state_dict()), tmp_path / "hub" / "open_clip_model.safetensors")
    with pytest.raises(ContractError, match=r"lacks \['visual.proj'\]"):
        import_tower(tmp_path / "hub", tmp_path / "tower")


def test_clip_without_its_activation_is_refused(tmp_path):
    vision = {"image_size": 28, "patch_size": 7, "width": 64, "layers": 1}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=TEXT)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="doesn't say its activation"):
        import_tower(tmp_path / "clip.pt", tmp_path / "tower")
    (tmp_path / "config.json").write_text('{"vision_cfg": {"head_width": 16}}')
    with pytest.raises(ValueError, match="doesn't say its activation"):
        import_tower(tmp_path / "clip.pt", tmp_path / "tower", config=tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"quick_gelu": true}')
    with pytest.raises(ValueError, match="no known CLIP tower has width 64"):
        import_tower(tmp_path / "clip.pt", tmp_path / "tower", config=tmp_path / "config.json")


def test_siglip_through_timm(tmp_path):
    timm = pytest.importorskip("timm", minversion="1.0")
    trunk = timm.models.vision_transformer.VisionTransformer(
        img_size=28,
        patch_size=7,
        embed_dim=32,
        depth=2,
        num_heads=4,
        class_token=False,
        global_pool="map",
        num_classes=0,
        act_layer="gelu_tanh",
    )
    trunk = randomised(trunk)
    state = {f"visual.trunk.{key}": value for key, value in trunk.state_dict().items()}
    state |= {"logit_scale": torch.tensor(2.0), "logit_bias": torch.tensor(-9.0)}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "siglip.safetensors")
    (tmp_path / "config.json").write_text('{"vision_cfg": {"heads": 4}}')
    card, _ = import_tower(tmp_path / "siglip.safetensors", tmp_path / "tower", config=tmp_path / "config.json")
    assert (card.family, card.dual["projection"], card.dual["logit_bias_init"]) == ("siglip", "none", -9.0)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert (
            largest_difference(load_tower(tmp_path / "tower")(pixel_values=pixels).pooler_output, trunk(pixels))
            < TOLERANCE
        )


def test_eva02_under_timms_names(tmp_path):
    timm = pytest.importorskip("timm", minversion="1.0")
    folder = REFERENCE / "A_vision_towers" / "eva02_l14"
    golden, config = read(folder), json.loads((folder / "config.json").read_text())["vision_cfg"]
    trunk = timm.models.eva.Eva(
        img_size=28,
        patch_size=7,
        embed_dim=40,
        depth=3,
        num_heads=2,
        mlp_ratio=2.6667,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(4, 4),
        num_classes=20,
        global_pool="token",
    )
    weights = timm.models.eva.checkpoint_filter_fn(
        {k: v for k, v in read(folder, "weights.safetensors").items() if "rope" not in k}, trunk
    )
    trunk.load_state_dict(weights, strict=False)
    state = {f"visual.trunk.{key}": value for key, value in trunk.state_dict().items() if "k_bias" not in key}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "timm.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_cfg": config}))
    import_tower(tmp_path / "timm.safetensors", tmp_path / "tower", config=tmp_path / "config.json")
    with torch.no_grad():
        embedding = load_dual_encoder(tmp_path / "tower").encode_image(golden["pixels"])
    assert largest_difference(embedding, golden["embedding_normalized"]) < TOLERANCE


def test_big_e_under_timms_names(tmp_path):
    """timm keeps EVA-CLIP's names where q, k, v are fused; on the hub its config.json names a timm model."""
    folder = REFERENCE / "A_vision_towers" / "eva02_bige14"
    golden, state = read(folder), read(folder, "weights.safetensors")
    trunk = {key.replace("visual.", "visual.trunk.", 1): value for key, value in state.items()}
    save_file(trunk, tmp_path / "timm.safetensors")
    import_tower(tmp_path / "timm.safetensors", tmp_path / "tower", config=folder / "config.json")
    with torch.no_grad():
        embedding = load_dual_encoder(tmp_path / "tower").encode_image(golden["pixels"])
    assert largest_difference(embedding, golden["embedding_normalized"]) < TOLERANCE
    (tmp_path / "hub").mkdir()
    save_file(
        read(REFERENCE / "C_checkpoint", "checkpoint.safetensors"), tmp_path / "hub" / "open_clip_model.safetensors"
    )
    fields = {"model_cfg": {"embed_dim": 24, "vision_cfg": {"timm_model_name": "eva02_large_patch14_clip_336"}}}
    (tmp_path / "hub" / "open_clip_config.json").write_text(json.dumps(fields))
    assert import_tower(tmp_path / "hub", tmp_path / "other")[0].family == "eva02"
