"""An LLM that is called bidirectional is: in every block, with padding and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llm import HYBRIDS
from transformers import AutoConfig, AutoModel, PreTrainedModel

from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.llm import check_attention, set_attention, set_kernels


def load(folder: Path, *, attention: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The LLM with the attention of its configuration set, but not of its layers."""
    settings = AutoConfig.from_pretrained(folder)
    set_attention(settings, attention)
    return AutoModel.from_pretrained(folder, config=settings, dtype=dtype).eval()


@pytest.mark.parametrize("family", ["stablelm", "nemotron"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_configuration_alone_leaves_some_families_causal(make_llm, tmp_path: Path, family: str, dtype) -> None:
    model = load(make_llm(tmp_path / family, family), attention="bidirectional", dtype=dtype)
    with pytest.raises(ValueError, match=r"2 of 2 blocks cannot attend to later tokens: 0 \(causal\), 1 \(causal\)"):
        check_attention(model, "bidirectional", where=family)
    set_kernels(model, "bidirectional")
    check_attention(model, "bidirectional", where=family)


def test_layers_alone_are_bidirectional_only_without_padding(make_llm, tmp_path: Path) -> None:
    model = load(make_llm(tmp_path / "stablelm", "stablelm"), attention="causal")
    set_kernels(model, "bidirectional")
    with pytest.raises(
        ValueError, match=r"StableLmModel, whose states change by 1\.\d+ of their norm if the batch has"
    ):
        check_attention(model, "bidirectional", where="stablelm")


@pytest.mark.parametrize("family", sorted(HYBRIDS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_attention_is_refused_unless_causal(make_llm, tmp_path: Path, family: str, dtype: str) -> None:
    """Its first state does depend on the last token, through the other block."""
    llm = make_llm(tmp_path / family, family)
    with pytest.raises(ValueError, match=r"1 of 2 blocks cannot attend to later tokens: 0 \(linear_attention\)\. Set "):
        CaptionEncoder(EncoderConfig(llm=str(llm), compute_dtype=dtype), "cpu")
    CaptionEncoder(EncoderConfig(llm=str(llm), compute_dtype=dtype, attention="causal"), "cpu")


def test_states_that_are_not_finite_are_refused(llama: Path) -> None:
    model = load(llama, attention="bidirectional", dtype=torch.float16)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"not finite in torch.float16: its weights are damaged, or too large"):
        check_attention(model, "bidirectional", where="llama")


def test_an_llm_without_blocks_has_nothing_to_check(llama: Path) -> None:
    CaptionEncoder(EncoderConfig(llm=str(llama), compute_dtype="float32", layer=0), "cpu")
