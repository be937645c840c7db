"""Hugging Face LLaVA models as LLaVA checkpoints: every tensor bit for bit, there and back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from serve_checkpoints import TODAY, full, tower_directory

from llava_integration.serve import parity
from llava_integration.serve.export import Export, export
from llm2clip_plugin.cli import main as llm2clip
from llm2clip_plugin.contracts import TowerCard


def same(ours, theirs):
    """Two safetensors files, bit for bit."""
    ours, theirs = load_file(ours), load_file(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.both_stacks
@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2", "eva02", *TODAY])
def test_there_and_back(tmp_path, home, capsys, tower):
    source = tower_directory(tower)
    checkpoint = full(tmp_path / "llava-tiny", source, llm2clip_conversation="v1")
    export(Export.of(checkpoint, dtype="keep"), tmp_path / "hf")
    back = tmp_path / "llava-back"
    assert llm2clip(["llava", "import", str(tmp_path / "hf"), "--output", str(back)]) == 0
    same(checkpoint / "model.safetensors", back / "model.safetensors")
    same(source / "model.safetensors", back / "vision_tower" / "model.safetensors")
    card, before = (TowerCard.read(folder / TowerCard.FILE) for folder in (back / "vision_tower", source))
    assert (card.weights_sha256, card.origin) == (before.weights_sha256, before.origin)
    assert card.weights_sha256 in capsys.readouterr().out
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, back))
    assert theirs.pop("mm_vision_tower") == "llm2clip" and ours.pop("mm_vision_tower")
    assert ours.items() <= theirs.items()


def test_llava_runs_what_was_imported(tmp_path, home):
    """Its own code finds the tower inside, and computes what transformers does."""
    export(Export.of(full(tmp_path / "llava-tiny", tower_directory("siglip")), dtype="fp32"), tmp_path / "hf")
    back = tmp_path / "llava-back"
    assert llm2clip(["llava", "import", str(tmp_path / "hf"), "--output", str(back)]) == 0
    assert parity.compare(Export.of(back, dtype="fp32"), tmp_path / "hf").logits <= 1e-4


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A model as llava-hf's: two tokens beyond LLaVA's, rows up to a multiple of 64, no word of this package."""
    root = tmp_path_factory.mktemp("hub")
    checkpoint = full(root / "llava-tiny", tower_directory("clip"))
    export(Export.of(checkpoint, dtype="keep"), root / "hf")
    (root / "hf" / "llm2clip_tower.json").unlink()
    config = json.loads((root / "hf" / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("llm2clip")}
    config["text_config"]["vocab_size"], config["pad_token_id"] = 640, 601
    (root / "hf" / "config.json").write_text(json.dumps(config))
    weights = load_file(root / "hf" / "model.safetensors")
    for name in ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"):
        weights[name] = torch.cat((weights[name], torch.ones(39, 32, dtype=torch.bfloat16)))
    save_file(weights, root / "hf" / "model.safetensors", {"format": "pt"})
    return checkpoint, root / "hf"


def test_a_model_of_llava_hf(hub, tmp_path, home):
    back = tmp_path / "llava-back"
    words = ["llava", "import", str(hub[1]), "--image-aspect-ratio", "square", "--output", str(back)]
    assert llm2clip(words) == 0
    same(hub[0] / "model.safetensors", back / "model.safetensors")
    config = json.loads((back / "config.json").read_text())
    assert (config["vocab_size"], config["pad_token_id"], config["image_aspect_ratio"]) == (600, 0, "square")


def test_names_of_transformers_5(hub, tmp_path, home):
    """A model that was tuned and saved there."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in hub[1].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    renamed = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old = next(prefix for prefix in renamed if name.startswith(prefix))
        weights[name.replace(old, renamed[old], 1)] = tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert llm2clip(["llava", "import", str(folder), "--output", str(tmp_path / "llava-back")]) == 0
    same(hub[0] / "model.safetensors", tmp_path / "llava-back" / "model.safetensors")


@pytest.mark.parametrize(
    "name, said",
    {
        "cut": "is not a complete safetensors file",
        "less": "4 of 25 tensors are missing, such as model.mm_projector.0.weight",
        "more": "unknown tensors language_model.model.layers.0.extra.weight",
        "tower": "missing ['",
        "qwen": "model_type is 'qwen2_vl', expected 'llava'",
        "relu": "projector_hidden_act is 'relu'",
        "tokenizer": "no tokenizer.model in",
    }.items(),
)
def test_damaged_and_foreign_models(hub, tmp_path, home, capsys, name, said):
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in hub[1].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights, path = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    if name == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif name == "tokenizer":
        (folder / "tokenizer.model").unlink()
    elif name in ("less", "tower", "more"):
        gone = {"less": "multi_modal_projector.", "tower": "vision_tower.vision_model.post", "more": " "}[name]
        weights = {key: value for key, value in weights.items() if not key.startswith(gone)}
        more = {"language_model.model.layers.0.extra.weight": torch.ones(1)} if name == "more" else {}
        save_file(weights | more, path, {"format": "pt"})
    else:
        config |= {"model_type": "qwen2_vl"} if name == "qwen" else {"projector_hidden_act": "relu"}
        (folder / "config.json").write_text(json.dumps(config))
    assert llm2clip(["llava", "import", str(folder), "--output", str(tmp_path / "llava-out")]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
    assert not list(tmp_path.glob("*llava-out*"))


def test_a_name_that_llava_would_misread(hub, tmp_path, capsys):
    assert llm2clip(["llava", "import", str(hub[1]), "--output", str(tmp_path / "model")]) == 2
    assert "without 'llava' in its name" in capsys.readouterr().err
