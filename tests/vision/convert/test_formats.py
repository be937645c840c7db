"""Other people's formats, opened by the libraries that they are for."""

import dataclasses
import json
import shutil

import pytest
import torch
from tiny_hub import tiny_hub

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.stages import export as export_command
from llm2clip_plugin.vision.convert import formats
from llm2clip_plugin.vision.convert.formats import convert
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.directory import DualConfig, check_card
from llm2clip_plugin.vision.dual import DualEncoder, load_dual
from llm2clip_plugin.vision.export import export_tower, push_to_hub
from llm2clip_plugin.vision.towers import load_tower

from ..conftest import REFERENCE, TRANSFORMERS_TOWERS, largest_difference, read

CHECKPOINT = REFERENCE / "C_checkpoint"
RELEASE = REFERENCE / "F_release_directory"


@pytest.fixture
def eva(tmp_path):
    import_tower(CHECKPOINT / "checkpoint.pt", tmp_path / "eva")
    return tmp_path / "eva"


@pytest.fixture
def clip(tmp_path):
    import_tower(RELEASE, tmp_path / "clip")
    return tmp_path / "clip"


def test_clip_with_projection(clip, tmp_path):
    from transformers import CLIPVisionModelWithProjection

    assert (
        export_command.main(
            [str(clip), "--output", str(tmp_path / "out"), "--format", "clip"]
        )
        == 0
    )
    model, info = CLIPVisionModelWithProjection.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    golden = read(RELEASE)
    with torch.no_grad():
        embeds = model(pixel_values=golden["pixels"]).image_embeds
    assert largest_difference(embeds, golden["image_embeds"]) < 2e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["eva", "siglip"])
def test_onnx_at_another_batch_size(name, tmp_path):
    for library in formats.ONNX_PACKAGES:
        pytest.importorskip(library)
    import onnxruntime

    source = (
        CHECKPOINT / "checkpoint.pt"
        if name == "eva"
        else TRANSFORMERS_TOWERS / "siglip_vision"
    )
    import_tower(source, tmp_path / "tower")
    convert(tmp_path / "tower", tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / formats.ONNX_FILE))
    size = TowerCard.read(tmp_path / "tower" / "llm2clip.json").image_size
    pixels = torch.randn(5, 3, size, size)
    output = torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])
    with torch.no_grad():
        if name == "eva":
            expected = load_dual(tmp_path / "tower")[0].encode_image(pixels)
        else:
            expected = load_tower(tmp_path / "tower")(pixel_values=pixels).pooler_output
    assert largest_difference(output, expected) < 2e-5


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "mean"},
        {"projection_norm": True},
        {"projection_bias": True},
        {"projection": "none"},
    ],
)
def test_what_a_format_cannot_hold_is_refused(options, tmp_path):
    tower = load_tower(TRANSFORMERS_TOWERS / "clip_vision")
    config = DualConfig(
        **{"projection_dim": tower.config.hidden_size, "llm_width": 12, **options}
    )
    export_tower(DualEncoder(tower, config), tmp_path / "tower", origin="x")
    with pytest.raises(ValueError, match=repr(options).strip("{}")):
        convert(tmp_path / "tower", tmp_path / "out", "clip")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(monkeypatch):
    with tiny_hub(monkeypatch) as handler:
        yield handler, handler.address


def test_push_sends_no_local_path(clip, hub, tmp_path):
    """The card and the README that are uploaded; the weights are the same, the directory does not
    change."""
    handler, _ = hub
    teacher = {
        "llm": str(tmp_path / "models" / "gemma"),
        "adapter": str(tmp_path / "secret" / "adapter"),
        "width": 8,
    }
    tower = tmp_path / "towers" / "mine"
    shutil.copytree(clip, tower)
    card = TowerCard.read(tower / TowerCard.FILE)
    training = {
        "data": [str(tmp_path / "photos")],
        "recipe": "base",
        "more": {"config": str(tmp_path / "a.json")},
    }
    card = dataclasses.replace(
        card, origin="../../models/start", teacher=teacher, training=training
    )
    card.write(tower / TowerCard.FILE)
    push_to_hub(tower, "o/n")
    for name, body in handler.files.items():
        (tmp_path / "uploaded" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "uploaded" / name).write_bytes(body)
    check_card(tmp_path / "uploaded")
    sent = json.loads(handler.files[TowerCard.FILE])
    assert (sent["origin"], sent["teacher"]) == ("start", {"llm": "gemma", "width": 8})
    assert sent["training"] == {
        "data": ["photos"],
        "recipe": "base",
        "more": {"config": "a.json"},
    }
    for name in (TowerCard.FILE, "README.md"):
        assert str(tmp_path).encode() not in handler.files[name]
        assert b"../" not in handler.files[name]
    assert b"`gemma`" in handler.files["README.md"]
    assert (
        handler.files["model.safetensors"] == (tower / "model.safetensors").read_bytes()
    )
    assert TowerCard.read(tower / TowerCard.FILE) == card


def test_push_refuses_weights_that_are_not_the_cards(clip, eva, hub):
    handler, _ = hub
    shutil.copy(eva / "model.safetensors", clip / "model.safetensors")
    with pytest.raises(ContractError, match=r"but llm2clip\.json records"):
        push_to_hub(clip, "o/n")
    assert not handler.files
    assert not handler.calls
