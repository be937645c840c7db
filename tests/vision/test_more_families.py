"""timm models by name, and DINOv3: tiny ones, in the training environment."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2clip_plugin import load_dual_encoder, load_tower
from llm2clip_plugin.contracts import TowerCard, sha256_weights
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.stages.tower import export as export_command
from llm2clip_plugin.vision.checkpoint import preprocessor_config
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.families import family_of, family_of_type
from llm2clip_plugin.vision.family import DualConfig
from llm2clip_plugin.vision.towers import resize_tower, tower_blocks, tower_embeddings_parameters

from .conftest import largest_difference, train_twenty_steps

TIMM_MODELS = [
    "vit_tiny_patch16_224",  # a class token
    "vit_wee_patch16_reg1_gap_256",  # a register, and a table without its row
    "vit_base_patch16_siglip_224",  # no prefix, attention pooling
    "eva02_tiny_patch14_224",  # rotary positions, which no file holds
]


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", minversion="1.0", reason="LLaVA's environment has timm 0.6")


@pytest.fixture(params=TIMM_MODELS)
def tower(timm, request):
    """The model of that name cut to two blocks, so that the tests stay short."""
    from llm2clip_plugin.vision.timm_tower import timm_tower

    return timm_tower(request.param, pretrained=False, arguments={"depth": 2, "embed_dim": 64, "num_heads": 4})


def test_states_and_outputs_of_a_timm_tower(tower):
    size = tower.config.image_size
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        output = tower(pixel_values=pixels, output_hidden_states=True)
        assert tower(pixel_values=pixels).hidden_states is None
        tower.config.output_hidden_states = True
        assert len(tower(pixel_values=pixels).hidden_states) == 3
        tower.config.output_hidden_states = False
        assert torch.equal(output.pooler_output, tower.model(pixels))
    patches = (size // tower.config.patch_size) ** 2
    assert len(output.hidden_states) == 3 == len(tower_blocks(tower)) + 1
    assert {state.shape for state in (*output.hidden_states, output.last_hidden_state)} == {(2, patches, 64)}
    seen = []
    tower_blocks(tower)[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        tower(pixel_values=pixels)
    assert torch.equal(output.hidden_states[-2], seen[0][:, tower.config.prefix_tokens :])


def test_timm_tower_trains_is_exported_and_comes_back(tower, tmp_path):
    size = tower.config.patch_size * 4
    tower = resize_tower(tower, size)
    dual = DualEncoder(tower, DualConfig(projection_dim=8, llm_width=12)).train()
    tower.gradient_checkpointing_enable()
    losses = train_twenty_steps(dual)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in tower_blocks(tower).parameters())
    assert all(p.grad is not None for p in tower_embeddings_parameters(tower))
    card = export_tower(dual, tmp_path / "tower", origin="timm:x")
    assert (card.family, card.has_cls, card.num_patches) == ("timm", False, (size // tower.config.patch_size) ** 2)
    text = (tmp_path / "tower" / "README.md").read_text()
    assert "This tower needs timm>=1.0: cannot run in LLaVA 1.5" in text and "--vision_tower" in text
    pixels = torch.randn(1, 3, size, size)
    with torch.no_grad():
        found = load_dual_encoder(tmp_path / "tower").encode_image(pixels)
        assert largest_difference(found, dual.eval().encode_image(pixels)) < 1e-5
        again, trained = (
            t(pixel_values=pixels, output_hidden_states=True).hidden_states
            for t in (load_tower(tmp_path / "tower"), tower)
        )
    assert all(largest_difference(mine, theirs) < 1e-5 for mine, theirs in zip(again, trained, strict=True))
    assert preprocessor_config(tmp_path / "tower")["image_mean"] == tower.config.image_mean


def test_timm_tower_at_another_size(tower):
    size = tower.config.patch_size * 7
    larger = resize_tower(tower, size)
    with torch.no_grad():
        assert larger(pixel_values=torch.randn(1, 3, size, size)).last_hidden_state.shape == (1, 49, 64)
    assert larger.config.resized_from == tower.config.image_size


def test_a_timm_tower_refuses_other_sizes_and_names_a_misshapen_tensor(tower, tmp_path):
    export_tower(tower, tmp_path / "tower", origin="timm:x")
    file = tmp_path / "tower" / "model.safetensors"
    size = tower.config.image_size + tower.config.patch_size
    loaded = load_tower(tmp_path / "tower")
    loaded.model.patch_embed.strict_img_size, loaded.model.dynamic_img_size = False, True  # what timm itself would take
    with pytest.raises(ValueError, match=rf"images have \({size}, {size}\) pixels, but the tower expects"):
        loaded(pixel_values=torch.randn(1, 3, size, size))
    state = load_file(file)
    state["model.blocks.1.norm1.weight"] = state["model.blocks.1.norm1.weight"][:-1].contiguous()
    save_file(state, file, {"format": "pt"})
    card = TowerCard.read(tmp_path / "tower" / TowerCard.FILE)
    dataclasses.replace(card, weights_sha256=sha256_weights(file)).write(tmp_path / "tower" / TowerCard.FILE)
    with pytest.raises(ContractError, match=r"missing \[\].*model.blocks.1.norm1.weight is \(63,\), expected \(64,\)"):
        load_tower(tmp_path / "tower")


def test_timm_names(timm, monkeypatch):
    from llm2clip_plugin.vision import timm_tower

    with pytest.raises(ValueError, match=r"unknown timm model 'vit_huge_patch7_9' .*similar names: .*vit_"):
        load_tower("timm:vit_huge_patch7_9")
    with pytest.raises(ValueError, match="resnet18 is not a plain vision transformer"):
        timm_tower.timm_tower("resnet18", pretrained=False)
    monkeypatch.setattr(timm, "__version__", "0.6.13")
    with pytest.raises(ValueError, match=r"requires timm 1.0 or newer; 0.6.13 is installed"):
        timm_tower.timm_tower("vit_tiny_patch16_224", pretrained=False)


def test_timm_by_name_and_size(timm, monkeypatch):
    from llm2clip_plugin.vision import timm_tower

    named = timm_tower.timm_tower
    monkeypatch.setattr(timm_tower, "timm_tower", lambda name: named(name, pretrained=False))  # no Hub in tests
    tower = load_tower("timm:vit_tiny_patch16_224", image_size=32, dtype=torch.bfloat16)
    assert (tower.config.image_size, tower.dtype) == (32, torch.bfloat16)
    assert family_of(tower).name == "timm"


def test_dinov3(tmp_path, capsys):
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        with pytest.raises(ValueError, match="DINOv3 requires transformers 5"):
            family_of_type("dinov3_vit", where="x").vision_class()
        return
    config = transformers.DINOv3ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_register_tokens=3,
    )
    plain = transformers.DINOv3ViTModel(config).eval()
    plain.save_pretrained(tmp_path / "plain")
    import_tower(tmp_path / "plain", tmp_path / "tower")
    tower = load_tower(tmp_path / "tower")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, expected = (m(pixel_values=pixels, output_hidden_states=True) for m in (tower, plain))
        again = transformers.DINOv3ViTModel.from_pretrained(tmp_path / "tower")(pixel_values=pixels)
    assert found.last_hidden_state.shape == (2, 17, 32) and len(found.hidden_states) == 3
    with pytest.raises(ValueError, match=r"images have \(40, 40\) pixels, but the tower expects 32 x 32"):
        tower(pixel_values=torch.randn(1, 3, 40, 40))
    assert tower(pixel_values=pixels).hidden_states is None
    tower.config.output_hidden_states = True
    assert [state.shape[1] for state in tower(pixel_values=pixels).hidden_states] == [17] * 3
    tower.config.output_hidden_states = False
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(mine[:, 0], theirs[:, 0]) and torch.equal(mine[:, 1:], theirs[:, 4:])
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert torch.equal(again.pooler_output, expected.pooler_output)
    dual = DualEncoder(tower, DualConfig(projection_dim=8, llm_width=12, pool="cls_mean")).train()
    losses = train_twenty_steps(dual)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in tower.parameters() if p.requires_grad)
    export_tower(dual, tmp_path / "trained", origin="tiny")
    assert export_command.main([str(tmp_path / "trained"), "--output", str(tmp_path / "copy")]) == 0
    assert "needs transformers>=5: cannot run in LLaVA 1.5" in capsys.readouterr().out
    with torch.no_grad():
        again, trained = (
            t(pixel_values=pixels, output_hidden_states=True).hidden_states
            for t in (load_tower(tmp_path / "trained"), tower.eval())
        )
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, trained, strict=True))
    assert not torch.equal(again[1], found.hidden_states[1])
    with torch.no_grad():
        assert (
            load_tower(tmp_path / "tower", image_size=48)(
                pixel_values=torch.randn(1, 3, 48, 48)
            ).last_hidden_state.shape[1]
            == 37
        )
