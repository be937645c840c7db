"""LLMs that cannot embed what their tokenizer gives, or whose weights are a pickle: one line before
the work."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_remote_code import change
from text_helpers import write_moved
from tiny_data import make_tower, write_tar
from transformers import AutoTokenizer

from llm2clip_plugin.cli import main
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_tar(
        tmp_path / "data" / "0.tar",
        [("0.png", b""), ("0.json", b'{"caption": "a red bicycle"}')],
    )
    return tmp_path / "data"


@pytest.fixture
def llm(make_llm, tmp_path: Path) -> Path:
    return make_llm(tmp_path / "llm", "llama")


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that ends with status 2."""
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def commands(llm: Path, data: Path, tmp_path: Path) -> list[list[str]]:
    tower = make_tower(tmp_path / "tower")
    output = tmp_path / "out"
    return [
        ["embed", str(data), "--llm", str(llm)],
        ["export-llm", "--llm", str(llm), "--output", str(output)],
        [
            "vlm",
            "build",
            "--tower",
            str(tower),
            "--llm",
            str(llm),
            "--output",
            str(output),
        ],
    ]


def test_a_vocabulary_smaller_than_the_tokenizers(
    llm: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(llm / "config.json", vocab_size=100)
    largest = max(AutoTokenizer.from_pretrained(llm).get_vocab().values())
    for words in commands(llm, data, tmp_path):
        error = refused(words, capsys)
        assert f"{llm}" in error
        assert (
            f"ids up to {largest}, its config.json vocab_size 100; copy the tokenizer"
            in error
        )


def test_a_special_token_beyond_the_vocabulary_is_no_problem_unless_it_frames_texts(
    llm: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gemma 3's tokenizer has one for images, the smallest model no row for it."""
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(llm)
    beyond = tokenizer.convert_tokens_to_ids("<image>")
    state = load_file(llm / "model.safetensors")
    state = {n: t[:beyond].clone() if len(t) == 400 else t for n, t in state.items()}
    save_file(state, llm / "model.safetensors", metadata={"format": "pt"})
    change(llm / "config.json", vocab_size=beyond)
    words = ["embed", str(data), "--llm", str(llm), "--compute-dtype", "float32"]
    assert main(words) == 0
    framed = refused(
        [
            *words,
            "--chat-template",
            "<image>{caption}",
            "--cache",
            str(data / "framed"),
        ],
        capsys,
    )
    assert f"ids up to {beyond}" in framed


class Code:
    """Runs a command when it is unpickled as Python does it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_a_pickled_llm(
    llm: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of tensors it is read; with code in it nothing is run, and the line says how to convert
    it."""
    state = load_file(llm / "model.safetensors")
    (llm / "model.safetensors").unlink()
    torch.save(state, llm / "pytorch_model.bin")
    assert (
        main(["embed", str(data), "--llm", str(llm), "--compute-dtype", "float32"]) == 0
    )
    torch.save({**state, "more": Code(tmp_path / "ran")}, llm / "pytorch_model.bin")
    shutil.rmtree(next(data.glob("embeddings-*")))
    for words in commands(llm, data, tmp_path):
        error = refused(words, capsys)
        assert (
            f"{llm / 'pytorch_model.bin'} would run or construct posix.system; "
            f"nothing in it was run"
        ) in error
        assert "save_pretrained(FOLDER)" in error
        assert "weights_only" not in error
    assert not (tmp_path / "ran").exists()


def test_an_adapter_is_used_without_a_warning(llm: Path, tmp_path: Path) -> None:
    """PEFT looks for the config.json of the LLM that an adapter names, which may be gone or on the
    Hub."""
    adapter = write_moved(llm, tmp_path / "adapter")[1]
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "/gone"})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        CaptionEncoder(
            EncoderConfig(llm=str(llm), adapter=str(adapter), compute_dtype="float32"),
            "cpu",
        )
