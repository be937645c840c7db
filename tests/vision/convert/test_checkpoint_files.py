"""Checkpoint files: truncated, wrapped, in shards, pickles with code."""

import pickle
from pathlib import Path

import pytest
import torch

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.directory import read_tensors

from ..conftest import REFERENCE, read
from .checkpoints import CHECKPOINT, EVA_FILES


@pytest.mark.parametrize("file", EVA_FILES)
def test_truncated_files_are_refused(file, tmp_path):
    whole = (CHECKPOINT / file).read_bytes()
    for part in (len(whole) // 2, 100):
        (tmp_path / file).write_bytes(whole[:part])
        with pytest.raises(ContractError, match="is not a complete"):
            import_tower(tmp_path / file, tmp_path / "tower")
    assert not (tmp_path / "tower").exists()


class Trap:
    """A pickle of this writes a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "ran"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", ["zip", "bare"])
def test_a_pickle_with_code_is_refused_and_not_run(protocol, tmp_path):
    trap = tmp_path / "ran.txt"
    if protocol == "zip":
        torch.save(
            {"logit_scale": torch.zeros(()), "x": Trap(trap)},
            tmp_path / "checkpoint.pt",
        )
    else:
        (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps({"x": Trap(trap)}))
    with pytest.raises(ContractError, match="nothing in it was run") as said:
        import_tower(tmp_path / "checkpoint.pt", tmp_path / "tower")
    assert not trap.exists()
    assert (
        "would run or construct getattr"
        if protocol == "zip"
        else "contains other objects"
    ) in str(said.value)
    assert "weights_only" not in str(said.value)
    assert "\x1b" not in str(said.value)
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.exists()  # the trap does work


def test_pickles_are_refused_where_torch_cannot_read_them_safely(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.1.2+cu121")
    with pytest.raises(ContractError, match="CVE-2025-32434"):
        read_tensors(CHECKPOINT / "checkpoint.pt")


@pytest.mark.parametrize(
    "wrapper",
    ["plain", "state_dict", "model", "module prefix", "state_dict, module prefix"],
)
def test_wrappers_of_a_training_checkpoint(wrapper, tmp_path):
    state = read(REFERENCE / "C_checkpoint", "checkpoint.safetensors")
    if "module prefix" in wrapper:
        state = {f"module.{name}": value for name, value in state.items()}
    key = wrapper.split(",")[0]
    whole = (
        {key: state, "epoch": 3, "name": "run"}
        if key in ("state_dict", "model")
        else state
    )
    torch.save(whole, tmp_path / "epoch_3.pt")
    card, _ = import_tower(tmp_path / "epoch_3.pt", tmp_path / "one")
    other_card, _ = import_tower(
        REFERENCE / "C_checkpoint" / "checkpoint.safetensors", tmp_path / "two"
    )
    assert card.weights_sha256 == other_card.weights_sha256
    assert card.adapter_sha256 == other_card.adapter_sha256
