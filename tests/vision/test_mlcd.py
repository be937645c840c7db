"""MLCD's towers: the states of transformers, at other sizes too, and every parameter is trained."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from llm2clip_plugin import load_tower
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.families import families
from llm2clip_plugin.vision.parts import tower_blocks, tower_embeddings_parameters

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "MLCDVisionModel"), reason="this transformers has no MLCD"
)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "image_size": 28, "patch_size": 14}
SIZES |= {"num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture
def original():
    """A random MLCD of transformers."""
    torch.manual_seed(0)
    return transformers.MLCDVisionModel(transformers.MLCDVisionConfig(**SIZES)).eval()


@pytest.mark.parametrize("size", [28, 56])
def test_states_are_transformers(original, tmp_path, size):
    original.save_pretrained(tmp_path / "hf")
    import_tower(tmp_path / "hf", tmp_path / "tower", image_size=size)
    card = TowerCard.read(tmp_path / "tower" / TowerCard.FILE)
    assert (card.family, card.has_cls, card.num_patches) == (
        "mlcd",
        True,
        (size // 14) ** 2,
    )
    tower = load_tower(tmp_path / "tower").eval()
    pixels = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        expected = original(pixels, output_hidden_states=True)
        outputs = tower(pixels, output_hidden_states=True)
    assert torch.equal(outputs.pooler_output, expected.pooler_output)
    assert len(outputs.hidden_states) == 4
    for state, other in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(state, other)


def test_every_parameter_has_its_place(original, tmp_path):
    """Below, in and above the blocks; all get a gradient from the pooled output."""
    original.save_pretrained(tmp_path / "hf")
    import_tower(tmp_path / "hf", tmp_path / "tower")
    tower = load_tower(tmp_path / "tower").train()
    placed = [*tower_embeddings_parameters(tower), *tower_blocks(tower).parameters()]
    placed += tower.post_layernorm.parameters()
    assert {id(parameter) for parameter in placed} == {
        id(parameter) for parameter in tower.parameters()
    }
    tower(torch.randn(2, 3, 28, 28)).pooler_output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in placed)


def test_older_libraries_are_named(monkeypatch):
    vision_class = families()["mlcd"].vision_class
    older = SimpleNamespace(__version__="4.37.2")
    monkeypatch.setattr("importlib.import_module", lambda name: older)
    with pytest.raises(ValueError, match="MLCD requires transformers 5 or newer; "):
        vision_class()
