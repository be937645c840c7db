"""Merged weights give the adapter's embeddings."""

import dataclasses
from pathlib import Path

import pytest
import torch
from text_helpers import write_moved
from transformers import AutoModel, AutoTokenizer

from llm2clip_plugin.cli import main
from llm2clip_plugin.stages.export import export_llm
from llm2clip_plugin.text.config import EncoderConfig, ExportConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.post import POST_FILE, remove_components

TEXTS = [
    "a red bicycle",
    "two sleeping dogs near the brick wall of an old house in rain",
    "x",
    "猫",
]


@pytest.mark.parametrize(
    "settings",
    [{}, {"layer": 1, "pooling": "last", "chat_template": "user"}],
    ids=["plain", "all"],
)
def test_merged_is_the_adapter(any_llm: Path, tmp_path: Path, settings: dict) -> None:
    _, adapter = write_moved(any_llm, tmp_path / "adapter", **settings)
    command = [
        "export-llm",
        "--llm",
        str(any_llm),
        "--adapter",
        str(adapter),
        "--output",
        str(tmp_path / "merged"),
    ]
    assert main(command) == 0
    merged = CaptionEncoder(
        EncoderConfig(llm=str(tmp_path / "merged"), compute_dtype="float32"), "cpu"
    )
    tuned = CaptionEncoder(
        EncoderConfig(llm=str(any_llm), adapter=str(adapter), compute_dtype="float32"),
        "cpu",
    )
    assert merged.config.pooling == tuned.config.pooling
    assert merged.config.layer == tuned.config.layer
    assert torch.allclose(merged.encode(TEXTS), tuned.encode(TEXTS), atol=1e-4)
    assert main(command) == 2  # the folder is not empty


def test_merged_folder_opens_as_a_plain_model(llama: Path, tmp_path: Path) -> None:
    """Bidirectional attention is in its config.json: two lines of transformers give our
    embedding."""
    _, adapter = write_moved(llama, tmp_path / "adapter")
    encoding = EncoderConfig(llm=str(llama), adapter=str(adapter))
    folder = export_llm(ExportConfig(output=str(tmp_path / "merged"), encoder=encoding))
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        hidden = model(**tokenizer(TEXTS[1], return_tensors="pt")).last_hidden_state
    tuned = CaptionEncoder(
        dataclasses.replace(encoding, compute_dtype="float32"), "cpu"
    )
    assert torch.allclose(hidden.mean(dim=1), tuned.encode(TEXTS[1:2]), atol=1e-4)


def test_post_processing_is_stored_with_the_card(llama: Path, tmp_path: Path) -> None:
    _, adapter = write_moved(llama, tmp_path / "adapter")
    where = {"llm": str(llama), "adapter": str(adapter)}
    before = CaptionEncoder(EncoderConfig(**where, compute_dtype="float32"), "cpu")
    (post,) = remove_components(before.encode(TEXTS), (1,))
    post.save(tmp_path)
    command = [
        "export-llm",
        "--llm",
        str(llama),
        "--adapter",
        str(adapter),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--post-file", str(tmp_path / POST_FILE)]) == 0
    after = CaptionEncoder(
        EncoderConfig(llm=str(tmp_path / "out"), compute_dtype="float32"), "cpu"
    )
    assert torch.allclose(after.encode(TEXTS), post(before.encode(TEXTS)), atol=1e-4)
    assert after.identity().post
    assert after.identity().fingerprint != before.identity().fingerprint
    (tmp_path / "out" / POST_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"llm2clip_post\.safetensors"):
        CaptionEncoder(EncoderConfig(llm=str(tmp_path / "out")), "cpu")
