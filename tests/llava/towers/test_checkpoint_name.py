"""LLaVA's rule about folder names is told before anything is loaded or trained."""

import json
from pathlib import Path

import pytest

from llava_integration import hook
from llava_integration import towers as checkpoint_name
from llava_integration.towers import option_value
from llm2clip_plugin import cli


def checkpoint(folder: Path, *files: str, **config: str) -> Path:
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).touch()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llava_llama", "mm_vision_tower": "llm2clip"} | config)
    )
    return folder


@pytest.mark.parametrize(
    "name, files, base, message",
    [
        ("mine", (), None, 'without "llava" in its name as a language model that sees no images, .*to llava-mine'),
        ("mine/checkpoint-10", (), None, "'mine_checkpoint-10'"),
        ("llava-x", ("adapter_config.json",), "b", 'without "lora" in its name, .* as a projector, .*to lora-llava-x'),
        ("llava-mpt", (), None, 'with "mpt" in its name as a mpt model, .*to llava'),
        ("llava-x", (), None, ""),
        ("my-llava/checkpoint-10", (), None, ""),
        ("llava-lora", ("adapter_config.json",), "b", ""),
    ],
)
def test_the_rule(tmp_path: Path, name: str, files: tuple[str, ...], base: str | None, message: str):
    path = checkpoint(tmp_path / name, *files)
    if not message:
        checkpoint_name.refuse_name(str(path), base=base)
        return
    with pytest.raises(ValueError, match=message):
        checkpoint_name.refuse_name(str(path), base=base)


def test_other_models_are_left_to_llava(tmp_path: Path):
    path = checkpoint(tmp_path / "vicuna", model_type="llama")
    (path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint_name.refuse_name(str(path))
    checkpoint_name.refuse_name("someone/some-model")


@pytest.mark.parametrize(
    "words",
    [
        ("llava", "evaluate", "--question-file", "q.jsonl", "--answers-file", "a.jsonl"),
        ("bench-mllm", "--data", ".", "--output", "out"),
    ],
)
def test_the_commands_tell_it_first(tmp_path: Path, monkeypatch, capsys, words: tuple[str, ...]):
    monkeypatch.chdir(tmp_path)
    path = checkpoint(tmp_path / "mine")
    assert cli.main([*words, "--model-path", str(path)]) == 2
    assert capsys.readouterr().err.startswith('error: LLaVA loads a folder without "llava" in its name')
    assert [one.name for one in tmp_path.iterdir()] == ["mine"]


def test_llavas_own_loader_tells_it_for_our_towers(tmp_path: Path):
    load = hook.wrap_load_pretrained_model(lambda *arguments, **options: "loaded")
    ours, other = checkpoint(tmp_path / "mine"), checkpoint(tmp_path / "other", mm_vision_tower="openai/clip")
    with pytest.raises(ValueError, match="rename it"):
        load(str(ours), None, "mine")
    assert load(str(ours), None, model_name="llava-mine") == load(str(other), None, "other") == "loaded"


def test_a_training_is_warned(capsys):
    checkpoint_name.warn_about(option_value(["train.py", "--output_dir", "runs/mine"], "--output_dir"))
    assert "runs/mine has no 'llava' in its name" in capsys.readouterr().err
    for words in (["--output_dir=runs/llava-mine"], ["--output_dir", "mine", "--output-dir", "llava-mine"], []):
        checkpoint_name.warn_about(option_value(["train.py", *words], "--output_dir"))
    assert capsys.readouterr().err == ""
