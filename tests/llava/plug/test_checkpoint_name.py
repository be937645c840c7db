"""LLaVA's rule about folder names is told before anything is loaded or trained."""

import json
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from llava_integration.plug import checkpoints, hook
from llm2clip_plugin import cli


def checkpoint(folder: Path, *files: str, **config: str) -> Path:
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).touch()
    config = {"model_type": "llava_llama", "mm_vision_tower": "llm2clip"} | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


REFUSED = {
    "mine": '"llava"',
    "mine/checkpoint-10": '"llava"',
    "llava-x": '"lora"',
    "llava-mpt": '"mpt"',
}


@pytest.mark.parametrize(
    "name", [*REFUSED, "llava-y", "my-llava/checkpoint-10", "llava-lora"]
)
def test_the_rule(tmp_path: Path, name: str):
    of_lora = name in ("llava-x", "llava-lora")
    path = checkpoint(tmp_path / name, *["adapter_config.json"] * of_lora)
    with (
        pytest.raises(ValueError, match=REFUSED[name])
        if name in REFUSED
        else nullcontext()
    ):
        checkpoints.refuse_name(str(path), base="b" if of_lora else None)


def test_the_command_tells_it_first(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = checkpoint(tmp_path / "mine")
    words = (
        "llava",
        "evaluate",
        "--question-file",
        "q.jsonl",
        "--answers-file",
        "a.jsonl",
    )
    assert cli.main([*words, "--model-path", str(path)]) == 2
    assert capsys.readouterr().err.startswith(
        'error: LLaVA loads a folder without "llava" in its name'
    )
    assert os.listdir(tmp_path) == ["mine"]


def test_llavas_own_loader_tells_it_for_our_towers(tmp_path: Path):
    load = partial(hook.load_pretrained_model, lambda *arguments, **options: "loaded")
    ours = checkpoint(tmp_path / "mine")
    other = checkpoint(tmp_path / "other", mm_vision_tower="openai/clip")
    with pytest.raises(ValueError, match="rename it"):
        load(str(ours), None, "mine")
    assert (
        load(str(ours), None, model_name="llava-mine")
        == load(str(other), None, "other")
        == "loaded"
    )
