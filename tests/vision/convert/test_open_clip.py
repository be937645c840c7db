"""OpenCLIP's layouts: checkpoints made by OpenCLIP and timm (training environment), and the release
under its names."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.towers import preprocessor_config

from ..conftest import largest_difference
from .checkpoints import TOLERANCE, open_clip_state_of_the_release, open_clip_vision

TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip(
        "open_clip", reason="open_clip is not part of LLaVA's environment"
    )


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """No parameter at zero or one, so that a swap of two shows."""
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + (
            0.7 if parameter.dim() == 1 else 0
        )
    return model.eval()


def save_as_on_the_hub(model, fields, folder) -> None:
    folder.mkdir()
    state = {
        name: value.contiguous().clone() for name, value in model.state_dict().items()
    }
    save_file(state, folder / "open_clip_model.safetensors")
    config = {
        "model_cfg": fields,
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_clip(open_clip, quick_gelu, tmp_path):
    vision = {
        "image_size": 28,
        "patch_size": 7,
        "width": 64,
        "layers": 2,
        "head_width": 16,
    }
    fields = {
        "embed_dim": 24,
        "vision_cfg": vision,
        "text_cfg": TEXT,
        "quick_gelu": quick_gelu,
    }
    model = randomized(
        open_clip.CLIP(
            **{
                k: fields[k]
                for k in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
            }
        )
    )
    save_as_on_the_hub(model, fields, tmp_path / "hub")
    card, report = import_tower(tmp_path / "hub", tmp_path / "tower")
    assert card.family == "clip"
    assert any("text tower, replaced by the LLM" in line for line in report)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = model.encode_image(pixels, normalize=True)
        assert (
            largest_difference(
                load_dual_encoder(tmp_path / "tower").encode_image(pixels), expected
            )
            < TOLERANCE
        )
    written = json.loads((tmp_path / "tower" / "preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.1, 0.2, 0.3]


def test_clip_without_its_activation_is_refused(open_clip, tmp_path):
    vision = {"image_size": 28, "patch_size": 7, "width": 64, "layers": 1}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=TEXT)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="does not record its activation"):
        import_tower(tmp_path / "clip.pt", tmp_path / "tower")


PE = {
    "mlp_ratio": 1.5,
    "attn_pool_num_heads": 2,
    "attn_pool_mlp_ratio": 1.5,
    "ref_feat_shape": [4, 4],
}


TRUNKS = [
    ("vit_base_patch16_siglip_224", "map", {}, ""),
    ("eva02_base_patch16_clip_224", "token", {}, "visual.head.proj."),
]
TRUNKS += [("vit_pe_core_base_patch16_224", "map", PE, "visual.trunk.head.")]


@pytest.mark.parametrize("name, pool, more, head", TRUNKS)
def test_towers_that_openclip_takes_from_timm(name, pool, more, head, tmp_path):
    timm = pytest.importorskip("timm", minversion="1.0")
    sizes = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 4, **more}
    trunk = randomized(
        timm.create_model(name, img_size=28, num_classes=0, global_pool=pool, **sizes)
    )
    state = {f"visual.trunk.{key}": value for key, value in trunk.state_dict().items()}
    projection = torch.randn(12, 32) if head else torch.eye(32)
    state |= (
        {f"{head}weight": projection, f"{head}bias": torch.zeros(12)} if head else {}
    )
    state |= {
        "text.text_projection": torch.randn(8, 12),
        "logit_scale": torch.tensor(2.0),
    }
    state["logit_bias"] = torch.tensor(-9.0)
    save_file(
        {k: v.contiguous() for k, v in state.items()},
        tmp_path / "open_clip_model.safetensors",
    )
    vision = {
        "timm_model_name": name,
        "timm_pool": pool,
        "image_size": 28,
        "timm_args": sizes,
    }
    fields = {
        "model_cfg": {"vision_cfg": vision},
        "preprocess_cfg": {"mean": [0.4] * 3, "interpolation": "bilinear"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(fields))
    card, report = import_tower(tmp_path, tmp_path / "tower")
    assert card.family == "timm"
    assert card.training["imported_as"] == "open_clip-timm"
    assert card.projection_dim == len(projection)
    assert card.dual["logit_bias_init"] == -9.0
    assert any("text tower, replaced by the LLM" in line for line in report)
    pixels = torch.randn(2, 3, 28, 28)
    preprocessor = preprocessor_config(tmp_path / "tower")
    assert (preprocessor["image_mean"], preprocessor["resample"]) == ([0.4] * 3, 2)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(trunk(pixels) @ projection.T, dim=-1)
        assert (
            largest_difference(
                load_dual_encoder(tmp_path / "tower").encode_image(pixels), expected
            )
            < TOLERANCE
        )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layers": 3}, "vision_cfg.layers is 3"),
        (
            {"image_size": 56},
            "vision_cfg.image_size is 56, but the tensors have 28.*--image-size 56",
        ),
        ({"pool_type": "avg"}, "pool_type is 'avg'"),
        ({"norm_kwargs": {"eps": 1e-6}}, "vision_cfg: norm_kwargs"),
    ],
)
def test_an_open_clip_configuration_of_another_tower_is_refused(
    fields, message, tmp_path
):
    save_file(
        open_clip_state_of_the_release(), tmp_path / "open_clip_model.safetensors"
    )
    for name, vision in (
        ("right", open_clip_vision(image_size=[28, 28])),
        ("wrong", open_clip_vision(**fields)),
    ):
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"quick_gelu": True, "vision_cfg": vision})
        )
    source = tmp_path / "open_clip_model.safetensors"
    with pytest.raises(ValueError, match=message):
        import_tower(source, tmp_path / "tower", config=tmp_path / "wrong.json")
    import_tower(source, tmp_path / "tower", config=tmp_path / "right.json")
