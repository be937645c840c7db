"""Checkpoints: written atomically, limited in number, resumed by rerunning the command.

    checkpoints/
      latest                 name of the newest complete checkpoint, written last
      step-00000120/
        model.safetensors      every parameter (trained ones in fp32) and buffer, by the module's own names
        optimizer.safetensors  NAME.exp_avg and NAME.exp_avg_sq
        ema.safetensors        moving averages, if train.ema_decay is set
        state.json             TrainState: step, samples, updates, loss scale, config and its hash

The format is independent of the number of ranks, the ZeRO stage and the precision. No generator state is saved: every
random draw is a function of the run's seed and a position in its order of samples (step.py).
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm2clip_plugin.contracts import ContractError, VersionedRecord, atomic_directory, atomic_file
from llm2clip_plugin.train.distributed import broadcast_object, rank

FOLDER = "checkpoints"
PREFIX_V01 = "dual."  # of tensor names in version 0.1's checkpoints of towers
LATEST = "latest"
RESUME_AUTO, RESUME_NEVER = "auto", "never"


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
    world_size: int = 1  # ranks that wrote it; any number can resume
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    seconds: float = 0.0  # training time so far


class HasState(Protocol):
    """The part of an engine that ``save`` needs; see EngineStates."""

    def weights(self, *, keep: bool) -> dict[str, Tensor]: ...

    def moments(self, *, keep: bool) -> dict[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint in memory."""

    path: Path
    state: TrainState
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    averages: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_folder: Path, *, keep: int) -> None:
        self.folder = run_folder / FOLDER
        self.keep = keep

    def save(self, state: TrainState, engine: HasState, averages: dict[str, Tensor]) -> Path:
        """Write a checkpoint on rank 0; every rank must call this. Raises OSError on every rank if writing fails."""
        writes = rank() == 0
        weights, moments = engine.weights(keep=writes), engine.moments(keep=writes)
        target = self.folder / f"step-{state.step:08d}"
        failure = None
        if writes:
            try:
                self._write(target, state, weights, moments, averages)
            except OSError as error:
                failure = f"cannot write the checkpoint {target}: {error}"
        failure = broadcast_object(failure)
        if failure:
            raise OSError(failure)
        return target

    def _write(
        self,
        target: Path,
        state: TrainState,
        weights: dict[str, Tensor],
        moments: dict[str, Tensor],
        averages: dict[str, Tensor],
    ) -> None:
        with atomic_directory(target, replace=True) as temporary:
            save_file(contiguous(weights), temporary / "model.safetensors")
            save_file(contiguous(moments), temporary / "optimizer.safetensors")
            if averages:
                save_file(contiguous(averages), temporary / "ema.safetensors")
            state.write(temporary / TrainState.FILE)
        with atomic_file(self.folder / LATEST) as temporary:
            temporary.write_text(target.name + "\n", encoding="utf-8")
        self._prune(target)

    def _prune(self, newest: Path) -> None:
        """Remove all but the newest ``keep`` checkpoints, and temporary files of a killed run."""
        for leftover in [*self.folder.glob(".*.tmp"), *self.folder.glob(".*.old")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        older = [path for path in sorted(self.folder.glob("step-*")) if path != newest]
        for path in older[: max(0, len(older) + 1 - self.keep)] if self.keep else []:
            shutil.rmtree(path)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None if there is none."""
        pointer = self.folder / LATEST
        if not pointer.is_file():
            return None
        path = self.folder / pointer.read_text(encoding="utf-8").strip()
        if not (path / TrainState.FILE).is_file():
            raise FileNotFoundError(
                f"{path}, named by {pointer}, does not exist; available checkpoints: {self.names()}. "
                f"Choose one with --resume {self.folder}/NAME, or delete {pointer} to start over"
            )
        return path

    def names(self) -> list[str]:
        """Names of the complete checkpoints, oldest first."""
        return sorted(path.parent.name for path in self.folder.glob(f"step-*/{TrainState.FILE}"))

    def find(self, resume: str) -> Path | None:
        """The checkpoint for a value of ``--resume``: auto (newest of this run, if any), never (None), or a path.

        Raises FileNotFoundError for a path without a checkpoint, FileExistsError for ``never`` if any exist.
        """
        if resume == RESUME_AUTO:
            return self.latest()
        if resume == RESUME_NEVER:
            if self.names():
                raise FileExistsError(
                    f"{self.folder} contains {self.names()}; refusing to overwrite with --resume never: choose another "
                    "--output_dir, or delete the folder"
                )
            return None
        path = Path(resume)
        if (path / TrainState.FILE).is_file():
            return path
        newest = Checkpoints(path, keep=0).latest() if path.is_dir() else None
        if newest is None:
            available = f"; available checkpoints of this run: {self.names()}" if self.names() else ""
            raise FileNotFoundError(f"--resume {resume}: no checkpoint found (no {TrainState.FILE}){available}")
        return newest


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies where needed: safetensors does not write strided tensors."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def load(path: Path, *, moments: bool = True) -> Loaded:
    """Read a checkpoint, without the optimizer's ``moments`` where only its weights are needed.

    Raises FileNotFoundError or ContractError naming the file that is missing or damaged.
    """
    state = TrainState.read(path / TrainState.FILE)
    tensors: dict[str, dict[str, Tensor]] = {"optimizer": {}}
    for name in ("model", "optimizer", "ema") if moments else ("model", "ema"):
        file = path / f"{name}.safetensors"
        if not file.is_file():
            if name == "ema":
                tensors[name] = {}
                continue
            raise FileNotFoundError(f"{file.name} is missing from the checkpoint {path}; resume from another one")
        try:
            tensors[name] = {key.removeprefix(PREFIX_V01): value for key, value in load_file(file).items()}
        except SafetensorError as error:
            raise ContractError(f"{file} is damaged ({error}); resume from another checkpoint") from error
    return Loaded(
        path=path, state=state, weights=tensors["model"], moments=tensors["optimizer"], averages=tensors["ema"]
    )
