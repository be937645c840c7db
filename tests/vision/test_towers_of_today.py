"""AIMv2, MetaCLIP 2, RADIO, DINOv2 with registers, TIPSv2, InternViT, Perception Encoder and
OpenVision, against states of transformers, timm and OpenCLIP.

tests/golden/make_towers_of_today.py wrote them. Families that the installed libraries are too old
for are left out.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llm2clip_plugin import load_dual_encoder, load_tower
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.families import families
from llm2clip_plugin.vision.parts import tower_blocks, tower_embeddings_parameters
from llm2clip_plugin.vision.towers import preprocessor_config
from llm2clip_plugin.vision.wrapped import make_timm

from .conftest import largest_difference, read, train_twenty_steps

GOLDEN = Path(__file__).parents[1] / "golden" / "towers_of_today"
TOLERANCE = 2e-5  # another version of torch or transformers, eager or fused attention
# of a checkpoint; others are named so
FAMILIES = {"aimv2_native": "aimv2", "aimv2_lit": "aimv2", "pe_core": "timm"}
FAMILIES |= {
    name: name for name in ("aimv2", "dinov3", "metaclip2", "radio", "openvision")
}
FAMILIES |= {
    name: name for name in ("dinov2_registers", "tipsv2", "internvl", "qwen25")
}
POOLS = {
    "aimv2": "mean",
    "dinov3": "cls_mean",
    "metaclip2": "mean",
    "radio": "cls_mean",
    "dinov2_registers": "cls_mean",
    "pe_core": "mean",
}
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
MEANS = {
    "aimv2": CLIP_MEAN,
    "dinov3": [0.485, 0.456, 0.406],
    "metaclip2": CLIP_MEAN,
    "radio": [0.0, 0.0, 0.0],
    "dinov2_registers": [0.485, 0.456, 0.406],
    "tipsv2": [0.0, 0.0, 0.0],
    "internvl": [0.485, 0.456, 0.406],
    "qwen25": CLIP_MEAN,
}
MEANS |= {"timm": [0.5, 0.5, 0.5], "openvision": [0.485, 0.456, 0.406]}


def why_not(family: str) -> str:
    """What a family lacks in this environment, in its own words; "" if it runs."""
    try:
        families()[family].vision_class()
        if family == "timm":
            make_timm("vit_tiny_patch16_224", None, pretrained=False)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(
    scope="module",
    params=[name for name, family in FAMILIES.items() if not why_not(family)],
)
def name(request) -> str:
    """A checkpoint whose family runs with the installed libraries."""
    return request.param


@pytest.fixture(scope="module")
def directory(name, tmp_path_factory) -> Path:
    """The checkpoint as a tower directory."""
    output = tmp_path_factory.mktemp(name) / "tower"
    import_tower(GOLDEN / name, output)
    return output


def states_of(tower, pixels):
    with torch.no_grad():
        return tower(pixel_values=pixels, output_hidden_states=True)


def test_states_equal_the_reference(name, directory):
    golden = read(GOLDEN / name)
    tower = load_tower(directory)
    family = families()[FAMILIES[name]]
    card = TowerCard.read(directory / TowerCard.FILE)
    preprocessor = preprocessor_config(directory)
    assert card.family == family.name
    assert card.has_cls == family.has_cls
    assert card.num_patches == 16
    assert card.num_layers == 2
    assert len(golden["kept"]) == card.num_patches + card.has_cls
    assert preprocessor["image_mean"] == MEANS[family.name]
    assert preprocessor["crop_size"] == {"height": 28, "width": 28}
    output = states_of(tower, golden["pixels"])
    kept = golden["kept"]
    expected = [
        golden[key][:, kept]
        for key in sorted(golden)
        if key.startswith("hidden_states_")
    ]
    assert len(output.hidden_states) == len(expected) == len(tower_blocks(tower)) + 1
    for mine, theirs in zip(output.hidden_states, expected, strict=True):
        assert largest_difference(mine, theirs) < TOLERANCE
    if "last_hidden_state" in golden:
        assert (
            largest_difference(
                output.last_hidden_state, golden["last_hidden_state"][:, kept]
            )
            < TOLERANCE
        )
    # a GPU would wait
    assert (
        "Index"
        not in tower(pixel_values=golden["pixels"]).last_hidden_state.grad_fn.name()
    )
    if "pooled" in golden:
        assert largest_difference(output.pooler_output, golden["pooled"]) < TOLERANCE
    with torch.no_grad():
        assert tower(pixel_values=golden["pixels"]).hidden_states is None
        if "embedding" in golden:
            encoded = load_dual_encoder(directory).encode_image(golden["pixels"])
            assert (
                largest_difference(
                    encoded, torch.nn.functional.normalize(golden["embedding"], dim=-1)
                )
                < TOLERANCE
            )


def test_trains_is_exported_and_comes_back(name, directory, tmp_path):
    tower = load_tower(directory)
    tower.gradient_checkpointing_enable()
    dual = DualEncoder(
        tower,
        DualConfig(projection_dim=8, llm_width=12, pool=POOLS.get(name, "pooled")),
    ).train()
    losses = train_twenty_steps(dual)
    assert losses[-1] < 0.5 * losses[0]
    assert not [
        n for n, p in dual.named_parameters() if p.requires_grad != (p.grad is not None)
    ]
    assert any(p.grad is not None for p in tower_embeddings_parameters(tower))
    export_tower(dual, tmp_path / "trained", origin="tiny")
    pixels = read(GOLDEN / name)["pixels"]
    reloaded = load_dual_encoder(tmp_path / "trained")
    with torch.no_grad():
        assert (
            largest_difference(
                reloaded.encode_image(pixels), dual.eval().encode_image(pixels)
            )
            < 1e-5
        )
        assert dual.encode_with_patches(pixels, patch_features=-2)[2].shape == (
            len(pixels),
            16,
            8,
        )
    before = states_of(load_tower(directory), pixels)
    after = states_of(load_tower(tmp_path / "trained"), pixels)
    assert not torch.equal(before.hidden_states[1], after.hidden_states[1])


def test_another_size_gives_its_patches(name, directory):
    tower = load_tower(directory, image_size=42)
    states = states_of(tower, torch.rand(1, 3, 42, 42)).hidden_states
    assert {state.shape[1] for state in states} == {
        36 + families()[FAMILIES[name]].has_cls
    }
    with pytest.raises(
        ValueError,
        match=r"images have \(28, 28\) pixels, but the tower expects 42 x 42",
    ):
        tower(pixel_values=torch.rand(1, 3, 28, 28))


def test_it_is_llavas_eye(name, directory):
    from llava_integration.plug.tower import LLM2CLIPVisionTower
    from llava_integration.plug.towers import locate

    args = SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature="patch")
    eye = LLM2CLIPVisionTower(
        "llm2clip", locate(f"llm2clip:{directory}"), args, delay_load=True
    )
    assert eye.hidden_size == 16
    assert eye.num_patches == 16
    assert eye.num_patches_per_side == 4
    assert eye.is_loaded is False
    eye.load_model()
    golden = read(GOLDEN / name)
    patches = golden["kept"][families()[FAMILIES[name]].has_cls :]
    assert (
        largest_difference(
            eye(golden["pixels"]), golden["hidden_states_01"][:, patches]
        )
        < TOLERANCE
    )
    assert eye(golden["pixels"].bfloat16()).dtype == torch.bfloat16
    assert eye.image_processor.crop_size == {"height": 28, "width": 28}


def test_openvision_needs_its_configuration(tmp_path):
    shutil.copy(GOLDEN / "openvision" / "open_clip_model.safetensors", tmp_path)
    (tmp_path / "open_clip_config.json").write_text('{"quick_gelu": false}')
    with pytest.raises(
        ContractError,
        match=r"no visual.ln_pre, like OpenVision.s, but .*no_ln_pre None.*--config",
    ):
        import_tower(tmp_path, tmp_path / "again")
