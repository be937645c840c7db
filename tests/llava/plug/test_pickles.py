"""Pickles in a LLaVA checkpoint: tensors are read, code is not run, with any version of torch."""

import os
from pathlib import Path

import pytest
import torch

from llava_integration.evaluator.answer.command import Answerer
from llava_integration.evaluator.answer.questions import AnswerConfig
from llava_integration.plug.pickles import load_tensors_only
from llm2clip_plugin.errors import ContractError


class Code:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(autouse=True)
def as_before_torch_2_6(monkeypatch):
    """Torch's own default is then to run what a pickle names."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr(torch, "load", torch.load)  # restored afterwards


@pytest.mark.both_stacks
def test_evaluating_a_checkpoint_does_not_run_code_in_its_pickles(
    tmp_path, monkeypatch
):
    path = tmp_path / "non_lora_trainables.bin"
    torch.save({"weight": torch.ones(2), "code": Code(tmp_path / "ran")}, path)
    from llava.model import builder

    def as_llava_does(*_):
        return torch.load(path, map_location="cpu")

    monkeypatch.setattr(builder, "load_pretrained_model", as_llava_does)
    options = AnswerConfig(
        model_path="llava-lora", question_file=path, answers_file=tmp_path / "a.jsonl"
    )
    with pytest.raises(
        ContractError, match=r"non_lora_trainables\.bin would run or construct"
    ):
        Answerer(options)
    assert not (tmp_path / "ran").exists()


def test_tensors_are_read(tmp_path):
    path = tmp_path / "mm_projector.bin"
    torch.save({"weight": torch.ones(2)}, path)
    load_tensors_only()
    assert torch.load(path, map_location="cpu")["weight"].sum() == 2
