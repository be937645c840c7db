"""Teachers made elsewhere: LLM2Vec checkpoints and adapters, LLM2CLIP's released LLMs."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_helpers import write_moved
from tiny_clip import TINY
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, T5Config

from llm2clip_plugin.contracts import EncoderCard
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.stages import embed, training
from llm2clip_plugin.text.config import EncoderConfig, effective
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.llm import refuse_length_dependent_rope
from llm2clip_plugin.text.teacher import encoder_config

TEXTS = [
    "a red bicycle",
    "two sleeping dogs near the brick wall of an old house in rain",
    "x",
    "猫",
]


def test_released_llm_is_read_as_llm2vec_reads_it(
    llama: Path, make_llm, tmp_path: Path
) -> None:
    """Their reading, step by step: user turn, bidirectional, mean over the caption's tokens and the
    end of the turn.

    Their files name a class of their own with remote code, and the tensors lack the ``model.``
    prefix.
    """
    folder = make_llm(tmp_path / "released", "llama")
    tensors = load_file(folder / "model.safetensors")
    bare = {
        name.removeprefix("model."): t.clone()
        for name, t in tensors.items()
        if name != "lm_head.weight"
    }
    save_file(bare, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["LlamaEncoderModel"],
        "auto_map": {"AutoModel": "modeling_llama_encoder.LlamaEncoderModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_llama_encoder.py").write_text(
        "raise SystemExit('remote code was run')"
    )
    template = "<user>\n{caption}<end>"  # the tiny tokenizer's words for Llama 3's
    encoder = CaptionEncoder(
        EncoderConfig(
            llm=str(folder),
            compute_dtype="float32",
            chat_template=template,
            include_bos=False,
        ),
        "cpu",
    )
    tokenizer = encoder.tokenizer
    model = AutoModel.from_pretrained(llama, dtype=torch.float32)
    ids = tokenizer("<user>\na red bicycle<end>", return_tensors="pt")["input_ids"]
    kept = len(tokenizer("a red bicycle<end>", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        hidden = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), is_causal=False
        ).last_hidden_state
    assert torch.allclose(
        encoder.encode(["a red bicycle"])[0], hidden[0, -kept:].mean(dim=0), atol=1e-5
    )


def test_preset_of_released_llms(llama: Path) -> None:
    config = CaptionEncoder(
        EncoderConfig(llm=str(llama), preset="llm2clip-llama3"), "cpu"
    ).config
    assert (
        config.chat_template
        == "<|start_header_id|>user<|end_header_id|>\n\n{caption}<|eot_id|>"
    )
    assert not config.include_bos
    assert config.preset == ""
    with pytest.raises(ContractError, match="preset llm2vec"):
        CaptionEncoder(
            EncoderConfig(llm=str(llama), preset="llm2vec", pooling="last"), "cpu"
        )
    with pytest.raises(ValueError, match="'gpt'"):
        EncoderConfig(preset="gpt")


def test_adapter_trained_with_the_language_head(llama: Path, tmp_path: Path) -> None:
    """LLM2Vec's adapters and most of the Hub's name the blocks one level deeper; there is no
    card."""
    trained, folder = write_moved(llama, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    deeper = {
        name.replace("base_model.model.", "base_model.model.model."): t
        for name, t in tensors.items()
    }
    save_file(deeper, str(folder / "adapter_model.safetensors"))
    (folder / EncoderCard.FILE).unlink()
    encoder = CaptionEncoder(
        EncoderConfig(llm=str(llama), adapter=str(folder), compute_dtype="float32"),
        "cpu",
    )
    assert torch.allclose(encoder.encode(TEXTS), trained.encode(TEXTS), atol=1e-4)


def test_sentence_transformers_is_not_read_by_default(
    llama: Path, tmp_path: Path
) -> None:
    """Its files have the pooling and prompts that it was trained with; stages and plans refuse it
    alike."""
    folder = shutil.copytree(llama, tmp_path / "embedding")
    (folder / "modules.json").write_text("[]")
    (folder / "model.safetensors").unlink()
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"image": "a.png", "caption": "a dog"})
    )
    with pytest.raises(
        ValueError, match=r"sentence-transformers model.* --preset last-token"
    ):
        CaptionEncoder(EncoderConfig(llm=str(folder)), "cpu")
    for plan, data in (
        (embed.main, [str(tmp_path / "rows.jsonl")]),
        (training.main_llm, []),
    ):
        with pytest.raises(
            ValueError, match=r"sentence-transformers model.* --preset last-token"
        ):
            plan([*data, "--llm", str(folder), "--dry-run"])
    for name, value in {
        "preset": "mean",
        "pooling": "last",
        "attention": "causal",
    }.items():
        effective(dataclasses.replace(EncoderConfig(), **{name: value}), folder)
    # as a tower's card names it
    named = CaptionEncoder(EncoderConfig(llm=str(llama)), "cpu").identity()
    effective(encoder_config(named, EncoderConfig(llm=str(folder))), folder)


def test_what_is_no_decoder_is_refused(llama: Path, tmp_path: Path) -> None:
    BertModel(BertConfig(vocab_size=400, **TINY)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a BertModel; expected a decoder LLM"):
        CaptionEncoder(EncoderConfig(llm=str(tmp_path)), "cpu")
    refuse_length_dependent_rope(T5Config(), 512)  # which knows no number of positions
