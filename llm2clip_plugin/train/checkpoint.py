"""A checkpoint: one folder, complete or absent, whose files are hashed while they are written.

    step-00000120/
      model.safetensors      every parameter (trained ones in fp32) and buffer, by the module's own names
      optimizer.safetensors  NAME.exp_avg and NAME.exp_avg_sq
      ema.safetensors        moving averages, if train.ema_decay is set
      twin.safetensors       weights of the frozen tower, if a loss term compares with one
      state.json             TrainState: step, samples, updates, loss scale, configuration, SHA-256 of the other files

The format is independent of the number of ranks, the ZeRO stage and the precision, except for the moments of an
optimizer ``by_rank``. No generator state is saved: every random draw is a function of the run's seed and a position in
its order of samples (step.py).
"""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llm2clip_plugin.contracts import ContractError, VersionedRecord, atomic_directory, sha256_file
from llm2clip_plugin.train.tensor_files import TensorFile, write_tensors

MODEL, OPTIMIZER, AVERAGES = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
TWIN = "twin.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainState(VersionedRecord):
    """``state.json``: the progress of a run."""

    KIND: ClassVar[str] = "llm2clip-train-state"
    FILE: ClassVar[str] = "state.json"

    step: int  # completed optimizer steps
    samples: int  # image-caption pairs consumed over all ranks: the position in the data
    config: dict[str, Any]
    config_hash: str
    seed: int
    updates: int = 0  # optimizer updates; fewer than steps if fp16 overflowed
    scaler: dict[str, Any] = field(default_factory=dict)  # fp16 loss scale
    world_size: int = 1  # ranks that wrote it
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    before: dict[str, float] = field(default_factory=dict)  # scores before step 1; {} if none were measured
    evaluated: int = 0  # step of that evaluation
    bad_batches: list[dict[str, Any]] = field(default_factory=list)  # left out: step, samples (position), reason
    seconds: float = 0.0  # training time so far
    files: dict[str, str] = field(default_factory=dict)  # name -> SHA-256
    checksum: str = ""  # of earlier releases; not used


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint that is open: its tensors are read from disk when they are looked up."""

    path: Path
    state: TrainState
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    averages: Mapping[str, Tensor]
    twin: Mapping[str, Tensor]


def write_checkpoint(target: Path, state: TrainState, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write tensors of the CPU by file, and ``state`` with their hashes, to the folder ``target``. Raises OSError."""
    with atomic_directory(target, replace=True) as temporary:
        files = {name: write_tensors(temporary / name, content) for name, content in tensors.items()}
        dataclasses.replace(state, files=files).write(temporary / TrainState.FILE)


def verify(path: Path, *, moments: bool = True) -> None:
    """Read a checkpoint once and compare its hashes; without ``moments``, not the optimizer's file.

    Raises FileNotFoundError or ContractError naming the file that is missing or damaged.
    """
    files = TrainState.read(path / TrainState.FILE).files
    names = [name for name in files if moments or name != OPTIMIZER]
    for name in names:
        _open(path, name)
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(names, pool.map(lambda name: sha256_file(path / name), names), strict=True):
            if digest != files[name]:
                raise ContractError(
                    f"{path / name} is damaged: its SHA-256 is {digest[:12]}..., {TrainState.FILE} says "
                    f"{files[name][:12]}..."
                )


def load(path: Path, *, moments: bool = True) -> Loaded:
    """Open a checkpoint, without the optimizer's ``moments`` where only its weights are needed; see ``verify``.

    Raises FileNotFoundError or ContractError naming the file that is missing or damaged.
    """
    state = TrainState.read(path / TrainState.FILE)
    return Loaded(
        path=path,
        state=state,
        weights=_open(path, MODEL),
        moments=_open(path, OPTIMIZER) if moments else {},
        averages=_open(path, AVERAGES) if AVERAGES in state.files else {},
        twin=_open(path, TWIN) if TWIN in state.files else {},
    )


def _open(path: Path, name: str) -> TensorFile:
    if not (path / name).is_file():
        raise FileNotFoundError(f"{name} is missing from the checkpoint {path}; resume from another one")
    return TensorFile(path / name)


@torch.no_grad()
def load_weights(module: nn.Module, weights: Mapping[str, Tensor], *, where: Path) -> None:
    """Copy a checkpoint's weights into a module, one tensor in memory at a time.

    Raises ContractError if the checkpoint has other tensors than the module.
    """
    own = module.state_dict()
    if differing := sorted(own.keys() ^ weights.keys()):
        raise ContractError(f"{where} does not fit the model: only one of them has {', '.join(differing[:5])}")
    for name, value in own.items():
        saved = weights[name]
        if saved.shape != value.shape:
            raise ContractError(f"{where}: {name} has shape {tuple(saved.shape)}, expected {tuple(value.shape)}")
        value.copy_(saved)
