"""LLaVA's rule about folder names is told before anything is loaded or trained."""

import json
from functools import partial
from pathlib import Path

import pytest

from llava_integration import checkpoints, hook
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
        ("mine", (), None, 'without "llava" in its name as a language model that sees no images'),
        ("mine/checkpoint-10", (), None, 'without "llava"'),
        ("llava-x", ("adapter_config.json",), "b", 'without "lora" in its name, .* as a projector'),
        ("llava-mpt", (), None, 'with "mpt" in its name as a mpt model'),
        ("llava-x", (), None, ""),
        ("my-llava/checkpoint-10", (), None, ""),
        ("llava-lora", ("adapter_config.json",), "b", ""),
    ],
)
def test_the_rule(tmp_path: Path, name: str, files: tuple[str, ...], base: str | None, message: str):
    path = checkpoint(tmp_path / name, *files)
    if not message:
        checkpoints.refuse_name(str(path), base=base)
        return
    with pytest.raises(ValueError, match=message):
        checkpoints.refuse_name(str(path), base=base)


def test_the_command_tells_it_first(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = checkpoint(tmp_path / "mine")
    words = ("llava", "evaluate", "--question-file", "q.jsonl", "--answers-file", "a.jsonl")
    assert cli.main([*words, "--model-path", str(path)]) == 2
    assert capsys.readouterr().err.startswith('error: LLaVA loads a folder without "llava" in its name')
    assert [one.name for one in tmp_path.iterdir()] == ["mine"]


def test_llavas_own_loader_tells_it_for_our_towers(tmp_path: Path):
    load = partial(hook.load_pretrained_model, lambda *arguments, **options: "loaded")
    ours, other = checkpoint(tmp_path / "mine"), checkpoint(tmp_path / "other", mm_vision_tower="openai/clip")
    with pytest.raises(ValueError, match="rename it"):
        load(str(ours), None, "mine")
    assert load(str(ours), None, model_name="llava-mine") == load(str(other), None, "other") == "loaded"
