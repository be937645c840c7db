"""EVA-CLIP's layout: the reference's checkpoints, other packings, timm's names."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llm2clip_plugin import load_dual_encoder, load_tower
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.convert import importing as command
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.convert.layouts.eva_clip import NAMES
from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel
from llm2clip_plugin.vision.families.eva02 import FAMILY

from ..conftest import REFERENCE, largest_difference, read
from .checkpoints import CHECKPOINT, EVA_FILES, LOGITS, TOLERANCE, to_theirs

TOWERS = REFERENCE / "A_vision_towers"


@pytest.mark.parametrize("file", EVA_FILES)
def test_complete_eva02_checkpoint(file, tmp_path, capsys):
    argv = [
        str(CHECKPOINT / file),
        "--output",
        str(tmp_path / "tower"),
        "--config",
        str(CHECKPOINT / "config.json"),
    ]
    assert command.main(argv) == 0
    assert (
        "left out (recomputed from the configuration and compared): "
        in capsys.readouterr().out
    )
    golden = read(CHECKPOINT)
    dual = load_dual_encoder(tmp_path / "tower")
    with torch.no_grad():
        image = dual.encode_image(golden["pixels"])
        text = dual.encode_text(golden["text_input"])
    assert largest_difference(image, golden["image_embeddings_normalized"]) < TOLERANCE
    assert largest_difference(text, golden["text_embeddings_normalized"]) < TOLERANCE
    assert (
        largest_difference(dual.logit_scale.squeeze(), golden["logit_scale_exp"])
        < TOLERANCE
    )
    assert (
        largest_difference(
            dual.logit_scale * image @ text.T, golden["logits_per_image"]
        )
        < LOGITS
    )


def test_rotary_tables_of_another_architecture_are_refused(tmp_path):
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config["vision_cfg"]["pt_hw_seq_len"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ContractError,
        match=r"freqs_cos .* differs from the table .* for grid 5, pt_hw_seq_len 16",
    ):
        import_tower(
            CHECKPOINT / "checkpoint.pt",
            tmp_path / "tower",
            config=tmp_path / "config.json",
        )


def test_released_sizes_are_read_off_the_tensors(tmp_path):
    """One block of EVA02-CLIP-B/16 in its real width, without rotary tables: nothing has to be
    told."""
    config = Eva02Config(**{**FAMILY.shapes["eva02-b16"], "num_hidden_layers": 1})
    tower = Eva02VisionModel(config).eval()
    state = to_theirs(NAMES, tower.state_dict())
    state |= {
        "visual.head.weight": torch.randn(8, 768),
        "visual.head.bias": torch.zeros(8),
    }
    save_file(
        {key: value.half().contiguous() for key, value in state.items()},
        tmp_path / "eva.safetensors",
    )
    import_tower(tmp_path / "eva.safetensors", tmp_path / "tower")
    again = load_tower(tmp_path / "tower")
    for field in (
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "rope_pretrained_grid",
        "rope",
    ):
        assert getattr(again.config, field) == getattr(config, field)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert (
        largest_difference(
            again.blocks[0].mlp.up_proj.weight, tower.blocks[0].mlp.up_proj.weight
        )
        < 1e-4
    )


def repacked(state: dict, how: str) -> dict:
    """The same tower as other writers pack it."""
    out = dict(state)
    for name in [name for name in state if name.endswith("attn.q_bias")]:
        at = name.removesuffix("attn.q_bias")
        if how == "split bias":
            out |= {
                f"{at}attn.{p}_proj.bias": out.pop(f"{at}attn.{p}_bias") for p in "qv"
            }
        else:
            out[f"{at}attn.qkv.weight"] = torch.cat(
                [out.pop(f"{at}attn.{p}_proj.weight") for p in "qkv"]
            )
    return out


@pytest.mark.parametrize("how", ["fused qkv", "split bias"])
def test_other_packings_give_the_same_tower(how, tmp_path):
    folder = TOWERS / "eva02_l14"
    save_file(
        repacked(read(folder, "weights_eva_clip_names.safetensors"), how),
        tmp_path / "eva.safetensors",
    )
    card, _ = import_tower(
        folder / "weights.safetensors", tmp_path / "a", config=folder / "config.json"
    )
    other_card, _ = import_tower(
        tmp_path / "eva.safetensors", tmp_path / "b", config=folder / "config.json"
    )
    assert card.weights_sha256 == other_card.weights_sha256
    assert card.adapter_sha256 == other_card.adapter_sha256


def test_an_adapter_trained_with_the_llm_in_the_loop_takes_embeddings_as_they_are(
    tmp_path,
):
    state = {
        name.replace("text.text_adaptor.", "text.text_proj.text_adaptor."): value
        for name, value in read(CHECKPOINT, "checkpoint.safetensors").items()
    }
    save_file(state, tmp_path / "live.safetensors")
    card, report = import_tower(tmp_path / "live.safetensors", tmp_path / "tower")
    assert card.dual["normalize_input"] is False
    assert any("with the LLM in the loop" in line for line in report)
    golden = read(CHECKPOINT)
    dual = load_dual_encoder(tmp_path / "tower")
    embeddings = torch.nn.functional.normalize(golden["text_input"], dim=-1)
    with torch.no_grad():
        text = dual.encode_text(embeddings)
        longer = dual.encode_text(2 * embeddings)
    assert largest_difference(text, golden["text_embeddings_normalized"]) < TOLERANCE
    assert largest_difference(text, longer) > TOLERANCE
