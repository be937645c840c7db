"""Other people's formats, opened by the libraries that they are for."""

import dataclasses
import importlib.util
import json
import shutil

import pytest
import torch
from tiny_hub import tiny_hub

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.stages import tower_export as export_command
from llm2clip_plugin.vision import DualConfig
from llm2clip_plugin.vision.convert import importing as formats
from llm2clip_plugin.vision.convert.importing import convert, import_tower
from llm2clip_plugin.vision.directory import check_card
from llm2clip_plugin.vision.dual import DualEncoder, load_dual
from llm2clip_plugin.vision.export import export_tower, push_to_hub
from llm2clip_plugin.vision.towers import load_tower

from ..conftest import REFERENCE, TRANSFORMERS_TOWERS, largest_difference, read

CHECKPOINT, RELEASE = REFERENCE / "C_checkpoint", REFERENCE / "F_release_directory"


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

    assert export_command.main([str(clip), "--output", str(tmp_path / "out"), "--format", "clip"]) == 0
    model, info = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    golden = read(RELEASE)
    with torch.no_grad():
        embeds = model(pixel_values=golden["pixels"]).image_embeds
    assert largest_difference(embeds, golden["image_embeds"]) < 2e-5


def test_eva_checkpoint_comes_back_tensor_for_tensor(eva, tmp_path):
    convert(eva, tmp_path / "out", "openclip")
    written = read(tmp_path / "out", "open_clip_model.safetensors")
    original = read(CHECKPOINT, "checkpoint.safetensors")
    assert written.keys() == original.keys()
    for name in original:
        assert torch.allclose(written[name], original[name], atol=1e-6 if "rope" in name else 0), name
    card, _ = import_tower(tmp_path / "out", tmp_path / "again")
    first = TowerCard.read(eva / "llm2clip.json")
    assert (card.weights_sha256, card.adapter_sha256) == (first.weights_sha256, first.adapter_sha256)


def test_clip_release_to_open_clip_and_back(clip, tmp_path):
    convert(clip, tmp_path / "out", "openclip")
    card, _ = import_tower(tmp_path / "out", tmp_path / "again")
    first = TowerCard.read(clip / "llm2clip.json")
    assert (card.weights_sha256, card.adapter_sha256) == (first.weights_sha256, first.adapter_sha256)


def test_open_clip_itself_opens_the_clip_tower(clip, tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not part of LLaVA's environment")
    convert(clip, tmp_path / "out", "openclip")
    golden = read(RELEASE)
    with torch.no_grad():
        found = image_tower_of(open_clip, tmp_path / "out")(golden["pixels"])
    assert largest_difference(found, golden["image_embeds"]) < 2e-5
    with pytest.raises(TypeError):  # as the documentation says; if it ever opens, that has to change
        open_clip.create_model(f"local-dir:{tmp_path / 'out'}")


@pytest.mark.parametrize("projection", ["none", "linear"])
def test_siglip_to_open_clip_and_back(projection, tmp_path):
    tower = load_tower(TRANSFORMERS_TOWERS / "siglip_vision")
    width = tower.config.hidden_size
    config = DualConfig(projection_dim=width, llm_width=12, projection=projection, logit_bias_init=-9.0)
    first = export_tower(DualEncoder(tower, config), tmp_path / "tower", origin="x")
    convert(tmp_path / "tower", tmp_path / "out", "openclip")
    assert ("visual.head.proj.weight" in read(tmp_path / "out", "open_clip_model.safetensors")) == (
        projection == "linear"
    )
    card, _ = import_tower(tmp_path / "out", tmp_path / "again")
    assert (card.weights_sha256, card.adapter_sha256) == (first.weights_sha256, first.adapter_sha256)
    assert (card.dual["projection"], card.dual["logit_bias_init"]) == (projection, -9.0)
    convert(tmp_path / "again", tmp_path / "twice", "openclip")
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def image_tower_of(open_clip, directory):
    """OpenCLIP's own image tower from an export, as the documentation says."""
    fields = json.loads((directory / "open_clip_config.json").read_text())["model_cfg"]
    weights = read(directory, "open_clip_model.safetensors")
    visual = open_clip.CLIP(fields["embed_dim"], fields["vision_cfg"], {}, fields["quick_gelu"]).visual
    visual.load_state_dict(
        {name.removeprefix("visual."): w for name, w in weights.items() if name.startswith("visual.")}
    )
    return visual.eval()


needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in formats.ONNX_PACKAGES), reason="ONNX is not installed"
)


@needs_onnx
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["eva", "siglip"])
def test_onnx_at_another_batch_size(name, tmp_path, request):
    import onnxruntime

    if name == "siglip":
        import_tower(TRANSFORMERS_TOWERS / "siglip_vision", tmp_path / "tower")
    source = tmp_path / "tower" if name == "siglip" else request.getfixturevalue("eva")
    convert(source, tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / formats.ONNX_FILE))
    size = TowerCard.read(source / "llm2clip.json").image_size
    pixels = torch.randn(5, 3, size, size)
    found = torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])
    with torch.no_grad():
        if name == "eva":
            expected = load_dual(source)[0].encode_image(pixels)
        else:
            expected = load_tower(source)(pixel_values=pixels).pooler_output
    assert largest_difference(found, expected) < 2e-5


def dual_with(**options) -> DualEncoder:
    tower = load_tower(TRANSFORMERS_TOWERS / "clip_vision")
    return DualEncoder(tower, DualConfig(**{"projection_dim": 8, "llm_width": 12, **options}))


@pytest.mark.parametrize(
    "options, format_name, message",
    [
        ({"pool": "mean"}, "clip", "'pool': 'mean'"),
        ({"projection_norm": True}, "openclip", "'projection_norm': True"),
        ({"input_scale": "sqrt_width"}, "openclip", "input_scale 'sqrt_width'"),
        ({"adapter": "linear"}, "openclip", "the paper's adapter"),
        ({"projection": "none", "projection_dim": 32}, "openclip", "'projection': 'none'"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(options, format_name, message, tmp_path):
    export_tower(dual_with(**options), tmp_path / "tower", origin="x")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "tower", tmp_path / "out", format_name)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(monkeypatch):
    with tiny_hub(monkeypatch) as handler:
        yield handler, handler.address


def test_push_sends_no_local_path(clip, hub, tmp_path):
    """The card and the README that are uploaded; the weights are the same, the directory does not change."""
    handler, _ = hub
    teacher = {"llm": str(tmp_path / "models" / "gemma"), "adapter": str(tmp_path / "secret" / "adapter"), "width": 8}
    tower = tmp_path / "towers" / "mine"
    shutil.copytree(clip, tower)
    card = TowerCard.read(tower / TowerCard.FILE)
    card = dataclasses.replace(card, origin="../../models/start", teacher=teacher)
    card.write(tower / TowerCard.FILE)
    push_to_hub(tower, "o/n")
    for name, body in handler.files.items():
        (tmp_path / "uploaded" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "uploaded" / name).write_bytes(body)
    check_card(tmp_path / "uploaded")
    sent = json.loads(handler.files[TowerCard.FILE])
    assert (sent["origin"], sent["teacher"]) == ("start", {"llm": "gemma", "width": 8})
    for name in (TowerCard.FILE, "README.md"):
        assert str(tmp_path).encode() not in handler.files[name] and b"../" not in handler.files[name]
    assert b"`gemma`" in handler.files["README.md"]
    assert handler.files["model.safetensors"] == (tower / "model.safetensors").read_bytes()
    assert TowerCard.read(tower / TowerCard.FILE) == card


def test_push_refuses_weights_that_are_not_the_cards(clip, eva, hub):
    handler, _ = hub
    shutil.copy(eva / "model.safetensors", clip / "model.safetensors")
    with pytest.raises(ContractError, match=r"but llm2clip\.json records"):
        push_to_hub(clip, "o/n")
    assert not handler.files and not handler.calls
