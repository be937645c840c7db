"""What a LoRA training trains in addition to its adapter is in its checkpoints, too."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from llava_integration.plug.training import (
    BESIDE_LORA,
    load_outside_lora,
    save_outside_lora,
)
from llm2clip_plugin.errors import ContractError

pytestmark = pytest.mark.both_stacks


def model(width: int = 4) -> nn.ModuleDict:
    """A frozen layer, LoRA's matrices and a projector."""
    layers = {
        name: nn.Linear(4, width)
        for name in ("base", "lora_A", "lora_B", "mm_projector")
    }
    layers["base"].requires_grad_(False)
    return nn.ModuleDict(layers)


def test_the_projector_comes_back(tmp_path):
    trained = model()
    save_outside_lora(trained, str(tmp_path))
    assert set(torch.load(tmp_path / BESIDE_LORA)) == {
        "mm_projector.weight",
        "mm_projector.bias",
    }
    resumed = model()
    load_outside_lora(resumed, str(tmp_path))
    assert torch.equal(resumed["mm_projector"].weight, trained["mm_projector"].weight)
    assert torch.equal(resumed["mm_projector"].bias, trained["mm_projector"].bias)
    # PEFT's part
    assert not torch.equal(resumed["lora_A"].weight, trained["lora_A"].weight)


def test_an_unfrozen_tower_has_the_names_of_llavas_own_libraries(tmp_path):
    """Transformers 5 names a CLIP's layers without ``vision_model``, which 4 would not find."""
    tower = nn.ModuleDict(
        {"encoder": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})}
    )

    def untrained():
        inner = nn.ModuleDict(
            {"vision_tower": nn.ModuleDict({"vision_tower": deepcopy(tower)})}
        )
        return nn.ModuleDict({"lora_A": nn.Linear(2, 2), "model": inner})

    trained = untrained()
    layer = trained["model"]["vision_tower"]["vision_tower"]["encoder"]["layers"][0]
    nn.init.constant_(layer.weight, 7.0)
    save_outside_lora(trained, str(tmp_path))
    name = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.weight"
    assert name in torch.load(tmp_path / BESIDE_LORA)
    resumed = untrained()
    load_outside_lora(resumed, str(tmp_path))
    layer = resumed["model"]["vision_tower"]["vision_tower"]["encoder"]["layers"][0]
    assert bool((layer.weight == 7.0).all())


def test_a_checkpoint_without_its_projector_is_refused(tmp_path):
    with pytest.raises(
        ContractError, match=f"has no {BESIDE_LORA}: .* learned nothing; delete"
    ):
        load_outside_lora(model(), str(tmp_path))
    save_outside_lora(model(width=5), str(tmp_path))
    with pytest.raises(
        ContractError, match=r"does not fit the model: mm_projector.bias, mm_p"
    ):
        load_outside_lora(model(), str(tmp_path))
    (tmp_path / BESIDE_LORA).write_bytes(b"no zip")
    with pytest.raises(ContractError, match=BESIDE_LORA):
        load_outside_lora(model(), str(tmp_path))


def test_without_lora_nothing_is_written(tmp_path):
    full = nn.ModuleDict({"mm_projector": nn.Linear(2, 2)})
    save_outside_lora(full, str(tmp_path))
    load_outside_lora(full, str(tmp_path))
    assert list(tmp_path.iterdir()) == []
