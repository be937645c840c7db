"""Masked next-token prediction: what is masked, what predicts it, and that cutting the batch changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from llm2clip_plugin.cli import main
from llm2clip_plugin.stages.llm.command import parse
from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.stages.llm.run import pretrain_llm, trained_module
from llm2clip_plugin.text.attention import set_kernels
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.mntp import UNMASKED, MaskedModule, choose_masked, output_head
from llm2clip_plugin.text.settings import EncoderConfig

WORDS = "a red bicycle leans against the brick wall of an old house near two sleeping dogs in rain".split()


@pytest.mark.parametrize("length", [1, 2, 3, 50, 1000])
def test_a_fifth_is_masked_never_the_first(length: int) -> None:
    chosen = [choose_masked(length, seed) for seed in range(50)]
    assert all(0 not in places and all(place < length for place in places) for places in chosen)
    assert all(places for places in chosen) is (length > 1)
    if length == 1000:
        assert 0.19 < sum(map(len, chosen)) / (50 * length) < 0.21


def test_masked_token_is_predicted_from_the_state_before_it(any_llm: Path) -> None:
    """At the start of LoRA the module is the LLM itself, with its own head."""
    encoding = EncoderConfig(llm=str(any_llm), compute_dtype="float32")
    encoder = CaptionEncoder(encoding, "cpu", trainable_adapter=True)
    module = MaskedModule(trained_module(encoder, FinetuneConfig(encoder=encoding)).model, output_head(encoder)).eval()
    (row,) = encoder.tokenize(["two sleeping dogs"])
    ids = torch.tensor([row])
    labels = torch.full_like(ids, UNMASKED)
    labels[0, 2], labels[0, -1] = row[2], row[-1]
    ones = torch.ones_like(ids)
    found = module(ids, ones, torch.arange(len(row))[None], labels)
    whole = AutoModelForCausalLM.from_pretrained(any_llm, dtype=torch.float32)
    whole.config.is_causal = False
    set_kernels(whole, "bidirectional")
    with torch.no_grad():
        logits = whole(input_ids=ids, attention_mask=ones).logits[0]
    expected = F.cross_entropy(logits[[1, len(row) - 2]], torch.tensor([row[2], row[-1]]), reduction="sum")
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_it_learns_and_cutting_changes_nothing(llama: Path, tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "image": "x", "caption": f"{WORDS[i % 16]} {i % 5}", "long_caption": " ".join(WORDS[i % 9 :])}
        for i in range(32)
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = [str(tmp_path / "c.jsonl"), "--llm", str(llama), "--compute-dtype", "float32", "--dropout", "0"]
    base += ["--global-batch", "16", "--max-steps", "6", "--lr", "1e-2", "--warmup-steps", "0"]
    losses = []
    for name, more in (("whole", []), ("cut", ["--micro-batch", "4"])):
        adapter = pretrain_llm(parse([*base, "--output-dir", str(tmp_path / name), *more]))
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert losses[0][-1] < losses[0][0] - 0.5
    merged = ["export-llm", "--llm", str(llama), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    assert main(merged) == 0
    assert main(["pretrain-llm", *base, "--layer", "1", "--output-dir", str(tmp_path / "no")]) == 2
