"""TRL's SFTTrainer on an exported model: the code of docs/serving.md, run as printed."""

from pathlib import Path

import pytest
import torch
from serving_page import block_with, check_trained, make_folder


def test_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower stays, the rest is trained; labels are the answers; servers know the saved names."""
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block_with("Trainer(model").partition("\narguments = ")[0], names)
    code = block_with("SFTTrainer(").replace("max_length=None", "max_length=None, use_cpu=True, report_to='none'")
    code = code.replace("max_steps=5000", "max_steps=4, logging_steps=1, bf16=False").replace("2e-5", "3e-3")
    exec(code.replace("device_train_batch_size=4", "device_train_batch_size=2"), names)
    sft, tokenizer = names["sft"], names["processor"].tokenizer
    losses = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    batch = next(iter(sft.get_train_dataloader()))
    learned = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert [text.split() for text in learned] == [["red</s>"], ["blue</s>"]]
    for ids, row in zip(batch["input_ids"], batch["labels"], strict=True):
        assert ids.tolist().count(tokenizer.bos_token_id) == 1
        assert torch.equal(ids[row != -100], row[row != -100])
    check_trained()
