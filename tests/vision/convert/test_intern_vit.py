"""InternViT with the tensor names of OpenGVLab's own code is the tower of transformers' names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.towers import load_tower

from ..conftest import read
from ..test_towers_of_today import GOLDEN, why_not

pytestmark = pytest.mark.skipif(
    bool(why_not("internvl")), reason="this transformers has no InternViT"
)
RENAMED = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection.": "embeddings.patch_embedding.",
    "encoder.layer.": "encoder.layers.",
    ".lambda_": ".ls",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".attention.projection_layer.": ".attn.proj.",
    ".attention.": ".attn.",
}


@pytest.fixture
def theirs(tmp_path):
    """The golden tower as OpenGVLab's code saves one, with a config.json of its kind."""
    ours = load_file(GOLDEN / "internvl" / "model.safetensors")
    state = {}
    for name, value in ours.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            parts = [ours[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            value = torch.cat(parts)
            name = name.replace("q_proj", "qkv")
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        state[name] = value
    config = {"model_type": "intern_vit_6b", "num_attention_heads": 2}
    config |= {"auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"}}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    return tmp_path / "theirs"


def test_it_is_the_same_tower(theirs, tmp_path):
    card, _ = import_tower(theirs, tmp_path / "tower")
    same, _ = import_tower(GOLDEN / "internvl", tmp_path / "same")
    assert card.family == "internvl"
    assert card.weights_sha256 == same.weights_sha256
    assert card.training["imported_as"] == "intern-vit"
    golden = read(GOLDEN / "internvl")
    with torch.no_grad():
        output = load_tower(tmp_path / "tower")(
            golden["pixels"], output_hidden_states=True
        )
    torch.testing.assert_close(output.hidden_states[-1], golden["hidden_states_02"])
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])


def test_the_small_ones_norms_are_layer_norms(theirs, tmp_path):
    """InternViT-300M: biases in the norms, no norm of queries and keys."""
    state = load_file(theirs / "model.safetensors")
    state = {name: v for name, v in state.items() if "q_norm" not in name}
    state = {name: v for name, v in state.items() if "k_norm" not in name}
    save_file(state, theirs / "model.safetensors", {"format": "pt"})
    import_tower(theirs, tmp_path / "tower")
    config = load_tower(tmp_path / "tower").config
    assert (config.norm_type, config.use_qk_norm, config.attention_bias) == (
        "layer_norm",
        False,
        True,
    )


def test_what_is_missing_or_unknown_is_named(theirs, tmp_path):
    with pytest.raises(ValueError, match="run `llm2clip import"):
        load_tower(theirs)
    state = load_file(theirs / "model.safetensors")
    save_file(state | {"embeddings.extra": torch.ones(1)}, theirs / "model.safetensors")
    with pytest.raises(ContractError, match=r"do not belong .*embeddings\.extra"):
        import_tower(theirs, tmp_path / "tower")
    del state["encoder.layers.1.ls2"]
    save_file(state, theirs / "model.safetensors")
    with pytest.raises(ContractError, match=r"missing \['encoder.layer.1.lambda_2'\]"):
        import_tower(theirs, tmp_path / "tower")
    (theirs / "config.json").write_text('{"model_type": "intern_vit_6b"}')
    with pytest.raises(ValueError, match="InternViT needs num_attention_heads"):
        import_tower(theirs, tmp_path / "tower")
