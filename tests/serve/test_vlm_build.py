"""``vlm build``: what it writes, and what it refuses in one line."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from serve_checkpoints import tower_directory
from tiny_llm import save_tiny_llm, tiny_tokenizer
from tiny_vlm import build, place
from transformers import (
    AutoModelForCausalLM,
)

from llava_integration.serve import trainers
from llava_integration.serve.build import ExportedTower
from llm2clip_plugin.cli import main as llm2clip


def test_image_uses_a_spare_row_or_a_new_one(
    built: Path, llms: Path, tmp_path: Path
) -> None:
    """The tiny tokenizer has fewer tokens than the embedding rows; without the spare ones, the mean
    is added."""
    of_llm = load_file(llms / "qwen3" / "model.safetensors")
    written = load_file(built / "model.safetensors")
    tokens = len(tiny_tokenizer())
    assert (
        json.loads((built / "config.json").read_text())["image_token_index"]
        == tokens
        < 400
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(written[f"language_model.{name}"], of_llm[name])
    llm: Any = AutoModelForCausalLM.from_pretrained(llms / "qwen3")
    llm.resize_token_embeddings(tokens)
    llm.save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    folder = build("clip", tmp_path / "llm", tmp_path / "vlm")
    written = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = written[f"language_model.{name}"]
        assert torch.equal(rows[:tokens], of_llm[name][:tokens])
        assert len(rows) == tokens + 1
        assert torch.allclose(rows[tokens], of_llm[name][:tokens].mean(0))


def test_seed_dry_run_and_shards(
    built: Path,
    llms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same seed gives the same projector; a plan counts what is written; shards are written one
    by one."""
    name = "multi_modal_projector.linear_1.weight"
    first = load_file(built / "model.safetensors")
    monkeypatch.setattr("llava_integration.serve.checkpoint.SHARD_BYTES", 50_000)
    sharded = build("clip", llms / "qwen3", tmp_path / "sharded")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 3
    second = {key: value for shard in shards for key, value in load_file(shard).items()}
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    monkeypatch.undo()
    words = ("clip", llms / "qwen3", tmp_path / "other", "--seed", "1")
    count = sum(value.numel() for value in first.values())
    nothing = build(*words, "--dry-run")
    assert f"{count:,} parameters" in capsys.readouterr().out
    assert not nothing.exists()
    assert not torch.equal(
        load_file(build(*words) / "model.safetensors")[name], first[name]
    )


def test_no_code_of_the_towers_folder_is_named(tmp_path: Path) -> None:
    """``auto_map`` of a tower's config.json would have a server run code that is not in the model's
    folder."""
    tower = shutil.copytree(tower_directory("clip"), tmp_path / "tower")
    fields = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(
        json.dumps({**fields, "auto_map": {"AutoModel": "modeling.Own"}})
    )
    assert "auto_map" not in ExportedTower.of(tower).config


def test_the_card_names_both_by_hash(built: Path) -> None:
    made = json.loads((built / "config.json").read_text())["llm2clip_vlm"]
    card = json.loads((built / "llm2clip_tower.json").read_text())
    assert "stage" not in made
    assert made["tower_sha256"] == card["weights_sha256"]
    assert len(made["llm_sha256"]) == 64
    readme = (built / "README.md").read_text()
    assert all(f"`{made[name]}`" in readme for name in ("tower_sha256", "llm_sha256"))
    assert "(stage 0)" in readme
    assert str(built.parent) not in readme + (built / "config.json").read_text()


@pytest.mark.parametrize(
    ("tower", "llm", "more", "message"),
    [
        (
            "clip",
            "base",
            (),
            "has no chat template; pass the instruction-tuned model as --llm, or --chat-template",
        ),
        (
            "clip",
            "gemma2",
            (),
            "has final_logit_softcapping 30.0, which transformers' LLaVA does not apply",
        ),
        ("clip", "vlm", (), "has a vision tower already; pass a language model"),
        ("clip", "quantized", (), "is quantized; pass the model that it was made from"),
        ("clip", "gpt2", (), "has a tensor transformer."),
        (
            "clip",
            "qwen3",
            ("--select-layer", "-9"),
            "mm_vision_select_layer -9 is out of range",
        ),
        ("clip", "qwen3", ("--chat-template", "broken.jinja"), "cannot be used"),
        ("nowhere", "qwen3", (), "nowhere is not a directory or a Hub id"),
        ("clip", "nowhere", (), "no LLM at"),
        (
            "clip",
            ".",
            (),
            "has no config.json; expected the folder of a Hugging Face model",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    built: Path,
    llms: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tower: str,
    llm: str,
    more: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jinja").write_text("{% for %}")
    folder = {"vlm": built}.get(llm, llms / llm)
    if llm in ("base", "quantized"):
        folder = save_tiny_llm(tmp_path / llm, "llama", template=llm != "base")
        config = json.loads((folder / "config.json").read_text())
        quantized = (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}}
            if llm == "quantized"
            else {}
        )
        (folder / "config.json").write_text(json.dumps(config | quantized))
    if llm == "gpt2":
        folder = tmp_path / "gpt2"
        sizes: dict[str, Any] = {
            "vocab_size": 400,
            "n_embd": 32,
            "n_layer": 1,
            "n_head": 2,
        }
        AutoModelForCausalLM.from_config(
            transformers.GPT2Config(**sizes)
        ).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    eye = str(place(tower) if tower == "clip" else tower)
    words = [
        "--tower",
        eye,
        "--llm",
        str(folder),
        "--output",
        str(tmp_path / "out"),
        *more,
    ]
    capsys.readouterr()
    assert llm2clip(["vlm", "build", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_tower_that_transformers_saved_has_the_names_that_servers_know(
    llms: Path, tmp_path: Path
) -> None:
    """transformers 5 saves CLIP's tower without ``vision_model.``, which vLLM then does not
    find."""
    other = shutil.ignore_patterns("*.safetensors", "llm2clip*")
    shutil.copytree(tower_directory("clip"), tmp_path / "clip", ignore=other)
    config = transformers.CLIPVisionConfig.from_pretrained(tower_directory("clip"))
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    assert "embeddings.class_embedding" in load_file(
        tmp_path / "clip" / "model.safetensors"
    )
    words = [
        "--tower",
        str(tmp_path / "clip"),
        "--llm",
        str(llms / "qwen3"),
        "--output",
        str(tmp_path / "vlm"),
    ]
    assert llm2clip(["vlm", "build", *words]) == 0
    names = [
        name
        for name in load_file(tmp_path / "vlm" / "model.safetensors")
        if name.startswith("vision_tower.")
    ]
    assert names
    assert all(name.startswith("vision_tower.vision_model.") for name in names)


def test_a_users_own_swift_plugins_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("swift", "swift.cli", "swift.cli.main"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(cli_main=lambda: None))
    monkeypatch.setattr(
        sys,
        "argv",
        ["trainers", "swift", "sft", "--external_plugins", "mine.py", "--model", "vlm"],
    )
    trainers.main()
    assert sys.argv[2:5] == ["--external_plugins", trainers.__file__, "mine.py"]
    assert "--template" in sys.argv
