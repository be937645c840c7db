"""timm models by name: tiny ones, in the training environment."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llm2clip_plugin import load_dual_encoder, load_tower
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.parts import tower_blocks, tower_embeddings_parameters
from llm2clip_plugin.vision.resize import resize_tower
from llm2clip_plugin.vision.towers import preprocessor_config

from .conftest import largest_difference, train_twenty_steps

TIMM_MODELS = [
    "vit_tiny_patch16_224",  # a class token
    "vit_wee_patch16_reg1_gap_256",  # a register, and a table without its row
    "vit_base_patch16_siglip_224",  # no prefix, attention pooling
    "eva02_tiny_patch14_224",  # rotary positions, which no file holds
    # Qwen3-VL's: a grid of states, positions that it interpolates itself, no final norm
    "qwen3_vit_88m_enc",
]


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip(
        "timm", minversion="1.0", reason="LLaVA's environment has timm 0.6"
    )


@pytest.fixture(params=TIMM_MODELS)
def tower(timm, request):
    """The model of that name cut to two blocks, so that the tests stay short."""
    from llm2clip_plugin.vision.towers import timm_tower

    return timm_tower(
        request.param,
        pretrained=False,
        arguments={"depth": 2, "embed_dim": 64, "num_heads": 4},
    )


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
    assert {
        state.shape for state in (*output.hidden_states, output.last_hidden_state)
    } == {(2, patches, 64)}
    seen = []
    tower_blocks(tower)[-1].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        tower(pixel_values=pixels)
    assert torch.equal(
        output.hidden_states[-2], seen[0][:, tower.config.prefix_tokens :]
    )


@pytest.mark.parametrize("name", ["cait_xxs24_224", "convit_tiny"])
def test_a_class_token_that_joins_after_some_blocks_is_refused(timm, name):
    from llm2clip_plugin.vision.towers import timm_tower

    sizes = {"depth": 2, "embed_dim": 16, "num_heads": 2}
    shapes = r"state 0 has the shape \(1, 196, \d+\), expected \(1, 197, \d+\): 1 class"
    with pytest.raises(
        ValueError, match=f"timm:{name} cannot be a tower: hidden {shapes}"
    ):
        timm_tower(name, pretrained=False, arguments=sizes)


REFUSED = {
    "vitamin_small_224": r"a convolutional stem \(HybridEmbed\) makes 14 x 14 patches of 224",
    "vit_tiny_r_s16_p8_224": r"a convolutional stem \(HybridEmbed\) makes 7 x 7 patches of 224",
    "xcit_nano_12_p16_224": r"timm's Xcit has no patch_embed.patch_size \(rows, columns\)",
    "test_vit_relpos": "timm's VisionTransformerRelPos has no pos_embed",
    "test_convnext": "timm's ConvNeXt has no patch_embed, blocks, num_prefix_tokens, pos_embed",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_of_timm_are_refused_by_what_they_lack(timm, name):
    from llm2clip_plugin.vision.towers import timm_tower

    with pytest.raises(
        ValueError, match=f"timm:{name} is not a plain vision.*: {REFUSED[name]}"
    ):
        timm_tower(name, pretrained=False)


@pytest.mark.parametrize("name", ["test_convnext", "cait_xxs24_224"])
def test_a_folder_of_timm_that_is_no_tower_says_why(timm, name, tmp_path):
    """As those on the Hub: config.json says the size, which not all of timm's models take."""
    body = {"architecture": name, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    (tmp_path / "config.json").write_text(json.dumps(body))
    save_file({"norm.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    reason = (
        "takes no image size" if "convnext" in name else "the class token joins later"
    )
    with pytest.raises(ValueError, match=f"timm:{name} .*{reason}"):
        import_tower(tmp_path, tmp_path / "tower")


def test_timm_tower_trains_is_exported_and_comes_back(tower, tmp_path):
    size = tower.config.patch_size * 4
    tower = resize_tower(tower, size)
    dual = DualEncoder(tower, DualConfig(projection_dim=8, llm_width=12)).train()
    tower.gradient_checkpointing_enable()
    losses = train_twenty_steps(dual)
    tower.gradient_checkpointing_disable()
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in tower_blocks(tower).parameters())
    assert all(p.grad is not None for p in tower_embeddings_parameters(tower))
    card = export_tower(dual, tmp_path / "tower", origin="timm:x")
    assert card.family == "timm"
    assert card.has_cls is False
    assert card.num_patches == (size // tower.config.patch_size) ** 2
    text = (tmp_path / "tower" / "README.md").read_text()
    assert "This tower needs timm>=1.0: cannot run in LLaVA 1.5" in text
    assert "--vision_tower" in text
    pixels = torch.randn(1, 3, size, size)
    with torch.no_grad():
        encoded = load_dual_encoder(tmp_path / "tower").encode_image(pixels)
        assert largest_difference(encoded, dual.eval().encode_image(pixels)) < 1e-5
        again, trained = (
            t(pixel_values=pixels, output_hidden_states=True).hidden_states
            for t in (load_tower(tmp_path / "tower"), tower)
        )
    assert all(
        largest_difference(mine, theirs) < 1e-5
        for mine, theirs in zip(again, trained, strict=True)
    )
    assert (
        preprocessor_config(tmp_path / "tower")["image_mean"] == tower.config.image_mean
    )
