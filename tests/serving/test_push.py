"""``llava export --push``: what a Hub receives, and what is said when it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from serve_checkpoints import full, tower_directory
from tiny_hub import TinyHub, tiny_hub

from llm2clip_plugin.cli import main as llm2clip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[TinyHub]]:
    with tiny_hub(monkeypatch) as handler:
        yield handler


def pushed(folder: Path, *options: str) -> int:
    """Export a tiny model to folder/hf, and push it."""
    checkpoint = full(folder / "llava-tiny", tower_directory("eva02"), llm2clip_conversation="v1")
    words = ["llava", "export", str(checkpoint), "--output", str(folder / "hf"), "--no-compare"]
    return llm2clip([*words, "--push", "me/llava-tiny", *options])


@pytest.mark.parametrize("options", [(), ("--public",)], ids=["private", "public"])
def test_every_file_arrives(tmp_path, hub, capsys, options):
    """The weights as the Hub takes large files, the tower's code, the template, the card."""
    assert pushed(tmp_path, *options) == 0
    assert f"{hub.address}/o/n/commit/1" in capsys.readouterr().out
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert {"model.safetensors", "eva02.py", "chat_template.jinja", "README.md"} <= hub.files.keys()
    (asked,) = hub.created
    assert (asked["name"], asked["organization"]) == ("llava-tiny", "me")
    assert (asked.get("private", False) or asked.get("visibility") == "private") == (not options)
    assert not [name for name, body in hub.files.items() if str(tmp_path).encode() in body]


@pytest.mark.parametrize("wrong, said", {"token": "401", "offline": "offline", "lfs": "storage is full"}.items())
def test_a_hub_that_refuses(tmp_path, hub, monkeypatch, capsys, wrong, said):
    """The model is complete, and the message says how to go on."""
    if wrong == "token":
        monkeypatch.setenv("HF_TOKEN", "hf_of_yesterday")
    elif wrong == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        hub.broken = wrong
    assert pushed(tmp_path) == 2
    *progress, error = capsys.readouterr().err.strip().splitlines()
    assert said in error.lower() and all("%" in line for line in progress)
    assert "the directory is complete: check the network, HF_ENDPOINT and `hf auth whoami`, then run" in error
    assert f"`hf upload me/llava-tiny {tmp_path / 'hf'}`" in error
    assert not hub.files and (tmp_path / "hf" / "model.safetensors").is_file()


def test_what_cannot_be_a_repository_is_told_first(tmp_path, hub, capsys):
    """Before the export, which takes a while."""
    assert pushed(tmp_path, "--push", "llava-tiny") == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "expected OWNER/NAME" in error
    assert not hub.calls and not (tmp_path / "hf").exists()
