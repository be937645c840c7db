"""An LLM that is called bidirectional is: in every block, with padding and without."""

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
    with pytest.raises(ValueError, match="blocks 0, 1 cannot attend"):
        check_attention(model, "bidirectional", where=family)
    set_kernels(model, "bidirectional")
    check_attention(model, "bidirectional", where=family)


def test_what_else_is_refused(make_llm, llama: Path, tmp_path: Path) -> None:
    """Layers that are bidirectional only without padding, linear attention unless causal."""
    model = load(make_llm(tmp_path / "stablelm", "stablelm"), attention="causal")
    set_kernels(model, "bidirectional")
    with pytest.raises(ValueError, match="padding"):
        check_attention(model, "bidirectional", where="stablelm")
    for family in HYBRIDS:  # the first state does depend on the last token, through the other block
        llm = str(make_llm(tmp_path / family, family))
        for dtype in ("float32", "bfloat16"):
            with pytest.raises(ValueError, match="blocks 0 cannot attend"):
                CaptionEncoder(EncoderConfig(llm=llm, compute_dtype=dtype), "cpu")
            CaptionEncoder(EncoderConfig(llm=llm, compute_dtype=dtype, attention="causal"), "cpu")
    CaptionEncoder(EncoderConfig(llm=str(llama), compute_dtype="float32", layer=0), "cpu")  # no blocks to check
