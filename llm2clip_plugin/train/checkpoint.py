"""A checkpoint: one folder, complete or absent, whose files are hashed while they are written.

    step-00000120/
      model.safetensors      every parameter (trained ones in fp32) and buffer, by its own name
      optimizer.safetensors  NAME.exp_avg and NAME.exp_avg_sq
      ema.safetensors        moving averages, if train.ema_decay is set
      twin.safetensors       weights of the reference tower, if a loss term compares with one
      state.json             TrainState: step, samples, updates, loss scale, configuration,
                             SHA-256 of the other files

The format is independent of the number of ranks, the ZeRO stage and the precision, except for the
moments of an optimizer ``by_rank``. No generator state is saved: every draw is a function of the
run's seed and a position (step.py).
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llm2clip_plugin.atomic import DiskFullError, atomic_directory, atomic_file
from llm2clip_plugin.contracts import RunRecord, VersionedRecord
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hashes import sha256_file
from llm2clip_plugin.progress import CHECKPOINT, phase
from llm2clip_plugin.run_folder import (
    CHECKPOINTS,
    LATEST,
    METRICS,
    PROGRESS,
    SAVE_FAILED,
    SAVED,
    tell_job,
)
from llm2clip_plugin.safetensors_header import read_header
from llm2clip_plugin.train.distributed import on_first_rank, rank, world_size

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
AVERAGES = "ema.safetensors"
REFERENCE = "twin.safetensors"
RESUME_AUTO = "auto"
RESUME_NEVER = "never"
BLOCK = 1 << 24  # bytes that are hashed and written at a time


@dataclass(frozen=True, kw_only=True)
class TrainState(VersionedRecord):
    """``state.json``: the progress of a run."""

    KIND: ClassVar[str] = "llm2clip-train-state"
    FILE: ClassVar[str] = "state.json"

    step: int  # completed optimizer steps
    samples: (
        int  # image-caption pairs consumed over all ranks: the position in the data
    )
    config: dict[str, Any]
    config_hash: str
    seed: int
    updates: int = 0  # optimizer updates; fewer than steps if fp16 overflowed
    scaler: dict[str, Any] = field(default_factory=dict)  # fp16 loss scale
    world_size: int = 1  # ranks that wrote it
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    # scores before step 1; {} if none were measured
    before: dict[str, float] = field(default_factory=dict)
    evaluated: int = 0  # step of that evaluation
    # left out: step, samples (position), reason
    bad_batches: list[dict[str, Any]] = field(default_factory=list)
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
    reference: Mapping[str, Tensor]  # of the reference tower


def write_checkpoint(
    target: Path, state: TrainState, tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write tensors of the CPU by file, and ``state`` with their hashes, to a folder. Raises
    OSError."""
    with atomic_directory(target, replace=True) as temporary:
        files = {
            name: write_tensors(temporary / name, content)
            for name, content in tensors.items()
        }
        dataclasses.replace(state, files=files).write(temporary / TrainState.FILE)


def verify(path: Path, *, moments: bool = True) -> None:
    """Compare a checkpoint's hashes. Raises FileNotFoundError or ContractError for a missing or
    damaged file."""
    files = TrainState.read(path / TrainState.FILE).files
    names = [name for name in files if moments or name != OPTIMIZER]
    with ThreadPoolExecutor() as pool:
        digests = pool.map(sha256_file, [path / name for name in names])
        for name, digest in zip(names, digests, strict=True):
            if digest != files[name]:
                expected = f"{TrainState.FILE} says {files[name][:12]}..."
                raise ContractError(
                    f"{path / name} is damaged: SHA-256 {digest[:12]}..., {expected}"
                )


def load(path: Path, *, moments: bool = True) -> Loaded:
    """Open a checkpoint, with or without the optimizer's ``moments``. Raises as ``verify``, which
    compares hashes."""
    state = TrainState.read(path / TrainState.FILE)
    return Loaded(
        path=path,
        state=state,
        weights=TensorFile(path / MODEL),
        moments=TensorFile(path / OPTIMIZER) if moments else {},
        averages=TensorFile(path / AVERAGES) if AVERAGES in state.files else {},
        reference=TensorFile(path / REFERENCE) if REFERENCE in state.files else {},
    )


@torch.no_grad()
def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], *, where: Path
) -> None:
    """Copy a checkpoint's weights into a module, one tensor in memory at a time; ContractError if
    those are others."""
    tensors = module.state_dict()
    if differing := sorted(tensors.keys() ^ weights.keys()):
        raise ContractError(
            f"{where} does not fit the model: only one of them has {', '.join(differing[:5])}"
        )
    for name, value in tensors.items():
        saved = weights[name]
        if saved.shape != value.shape:
            raise ContractError(
                f"{where}: {name} has shape {tuple(saved.shape)}, expected {tuple(value.shape)}"
            )
        value.copy_(saved)


class Checkpoints:
    """The checkpoints of one run folder: which one to resume from, which to keep.

        checkpoints/
          step-00000110/, step-00000120/
          latest                            name of the newest one, for people and scripts
          abandoned-20261126-101500/        checkpoints and metrics.jsonl of steps that a run
                                            went back before

    All of ``step-*`` belong to one sequence of steps: what a run does not continue from is moved to
    ``abandoned-*``.
    """

    def __init__(
        self, run_folder: Path, *, keep: int
    ) -> None:  # keep: how many; 0: all
        self.run_folder = run_folder
        self.folder = run_folder / CHECKPOINTS
        self.keep = keep

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def names(self) -> list[str]:
        """Names of the complete checkpoints, oldest first."""
        return sorted(
            path.parent.name for path in self.folder.glob(f"step-*/{TrainState.FILE}")
        )

    def latest(self) -> Path | None:
        """The newest complete checkpoint, not verified; None if there is none."""
        return next((self.folder / name for name in reversed(self.names())), None)

    def write(
        self, state: TrainState, tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[float, list[str]]:
        """Write a checkpoint of tensors by file, then remove old ones; returns seconds and
        warnings. Raises OSError."""
        started = time.perf_counter()
        target = self.path(state.step)
        write_checkpoint(target, state, tensors)
        self._point_to(target.name)
        tell_job(PROGRESS)
        warnings = self._prune(target)
        return time.perf_counter() - started, warnings

    def record_metrics(self, state: TrainState) -> None:
        """Put an evaluation into the checkpoint of its step, if there is one."""
        path = self.path(state.step) / TrainState.FILE
        if path.is_file():
            saved = TrainState.read(path)
            dataclasses.replace(
                saved, metrics=state.metrics, evaluated=state.evaluated
            ).write(path)

    def _point_to(self, name: str) -> None:
        with atomic_file(self.folder / LATEST) as temporary:
            temporary.write_text(name + "\n", encoding="utf-8")

    def _prune(self, newest: Path) -> list[str]:
        """Remove all but the newest ``keep`` checkpoints, and what a killed run left; returns what
        failed."""
        older = [
            path
            for path in sorted(self.folder.glob("step-*"))
            if path.name < newest.name
        ]
        removed: list[Path] = []
        if self.keep:
            kept_before = self.keep - 1  # in addition to the newest
            count = max(0, len(older) - kept_before)
            removed += older[:count]
        removed += self.folder.glob(".*.tmp")
        removed += self.folder.glob(".*.old")
        warnings = []
        for path in removed:
            try:
                # half removed, it could be taken for a complete one
                if not path.name.startswith("."):
                    path = path.rename(
                        path.with_name(f".{path.name}.{time.time_ns():x}.old")
                    )
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError as error:
                warnings.append(
                    f"cannot remove {path}: {error}; trying again after the next save"
                )
        return warnings

    def find(
        self, resume: str, *, moments: bool = True, option: str = "--resume"
    ) -> Path | None:
        """The verified checkpoint for a value of ``--resume``: auto (newest of this run, if any),
        never (None), a path.

        ``auto``, and the path of a run, fall back to an older one with a warning. Raises
        FileNotFoundError for a path without a checkpoint, the value of ``option``, or a run that
        has lost its checkpoints, ContractError if all are damaged or the named one is,
        FileExistsError for ``never`` if any exist.
        """
        if resume == RESUME_AUTO:
            newest = self._newest_intact(moments)
            record = self.run_folder / RunRecord.FILE
            if (
                newest is None
                and record.is_file()
                and (step := RunRecord.read(record).step)
            ):
                raise FileNotFoundError(
                    f"{self.folder} has no checkpoint, but the run had reached step {step}: "
                    "restore the checkpoints, choose another --output, "
                    "or start over with --resume never"
                )
            return newest
        if resume == RESUME_NEVER:
            if self.names():
                raise FileExistsError(
                    f"{self.folder} has {self.names()}, but --resume never: choose another --output"
                )
            return None
        path = Path(resume)
        if (path / TrainState.FILE).is_file():
            verify(path, moments=moments)
            return path
        if newest := Checkpoints(path, keep=0)._newest_intact(moments):
            return newest
        raise FileNotFoundError(
            f"{option} {resume}: no checkpoint found (no {TrainState.FILE}) among {self.names()}"
        )

    def _newest_intact(self, moments: bool) -> Path | None:
        """The newest checkpoint that is verified, with a warning if a newer one is damaged; None if
        there is none."""
        damaged = []
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                verify(path, moments=moments)
            except (ContractError, OSError) as error:
                damaged.append(str(error))
                continue
            if damaged:
                print(
                    f"warning: {'; '.join(damaged)}\nwarning: falling back to {path}",
                    file=sys.stderr,
                )
            return path
        if damaged:
            raise ContractError(
                f"no intact checkpoint in {self.folder}: {'; '.join(damaged)}; "
                "choose another --output"
            )
        return None

    def move_aside(self, resumed: Path | None) -> str:
        """Move checkpoints newer than ``resumed``, or all if that is in another folder, to
        ``abandoned-*``; returns a line about it, "" if there are none."""
        newest = ""  # name of the checkpoint that stays the newest one here
        if resumed and resumed.resolve().parent == self.folder.resolve():
            newest = resumed.name
        names = sorted(
            path.name for path in self.folder.glob("step-*") if path.name > newest
        )
        if not names:
            return ""
        abandoned = self.folder / f"abandoned-{time.strftime('%Y%m%d-%H%M%S')}"
        abandoned.mkdir(exist_ok=True)
        for name in names:
            os.replace(self.folder / name, abandoned / name)
        if (self.run_folder / METRICS).is_file():
            shutil.copy2(self.run_folder / METRICS, abandoned)
        if newest:
            self._point_to(newest)
        return (
            f"moved {', '.join(names)} to {abandoned}; "
            "delete that folder when you no longer need it"
        )


class Saver:
    """Saves a run's checkpoints in the background; leaving the context waits for the write in
    progress.

    Every rank needs one. ``save`` gathers the state in rank 0's memory, which a thread hashes and
    writes. A periodic save that fails leaves the last checkpoint in place, and the next tries
    again; the last must succeed. No rank waits for the disk in a collective.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        engine: Any,
        averages: Mapping[str, Any] | None = None,
        *,
        note: Callable[[str], None] = print,
        event: Callable[[dict[str, Any]], None] = lambda values: None,
    ) -> None:
        """averages: WeightAverage by the name of its file. note: shows a line. event: a line of
        metrics.jsonl."""
        self.checkpoints = checkpoints
        self.engine = engine
        self.averages = averages or {}
        self._note = note
        self._event = event
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # the last one: seconds, and warnings
        self._write: Future[tuple[float, list[str]]] | None = None
        # of the last save: step, and seconds that training waited for it
        self._step = 0
        self._waited = 0.0
        self._reported = True
        self._recording: Future[None] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with phase(CHECKPOINT):
            self._thread.shutdown(wait=kind is not KeyboardInterrupt)
        self.poll()

    @property
    def busy(self) -> bool:
        """Whether this rank is writing."""
        self.poll()
        return not self._reported

    @phase("gathering the checkpoint")
    def save(self, state: TrainState, *, last: bool = False) -> None:
        """Copy the state and start to write it; every rank must call this, and none while one is
        busy unless this is the ``last`` save, which waits for the write in progress."""
        started = time.perf_counter()
        if last:
            with phase(CHECKPOINT):
                on_first_rank(self._wait)
        self._write = None  # whose error, if it failed, holds the tensors
        copy = on_host if rank() == 0 else None
        tensors = {
            MODEL: self.engine.weights(copy),
            OPTIMIZER: self.engine.moments(copy),
        }
        tensors |= {
            name: average.values(copy) for name, average in self.averages.items()
        }
        state = dataclasses.replace(
            state, **self.engine.scaler_state(), world_size=world_size()
        )
        if rank() == 0:
            self._step = state.step
            self._waited = time.perf_counter() - started
            self._reported = False
            self._write = self._thread.submit(self.checkpoints.write, state, tensors)

    def record_metrics(self, state: TrainState) -> None:
        """Put the evaluation of the last saved step into its checkpoint, in the background."""
        if rank() == 0:
            self._recording = self._thread.submit(
                self.checkpoints.record_metrics, state
            )

    def poll(self) -> None:
        """Report a write that has ended since the last call."""
        if self._write is None or self._reported or not self._write.done():
            return
        self._reported = True
        error = self._write.exception()
        if isinstance(error, OSError):
            self._note(
                f"warning: {self._failure(error)}; trying again at the next save"
            )
            self._event(
                {"step": self._step, "event": SAVE_FAILED, "reason": _reason(error)}
            )
            return
        seconds, warnings = self._write.result()
        for line in warnings:
            self._note(f"warning: {line}")
        times = {
            "waited_seconds": round(self._waited, 4),
            "write_seconds": round(seconds, 4),
        }
        self._event({"step": self._step, "event": SAVED, **times})

    def finish(self) -> None:
        """Wait until the last save is complete; every rank must call this. Raises OSError
        (FirstRankError on other ranks) if it failed."""
        with phase(CHECKPOINT):
            on_first_rank(lambda: self._wait(last=True))

    def _wait(self, *, last: bool = False) -> None:
        """Wait for the write in progress and report it; the ``last`` one of a run must not have
        failed."""
        error = self._write.exception() if self._write is not None else None  # waits
        if last and isinstance(error, OSError):
            self._reported = True
            raise OSError(
                f"{self._failure(error)}: free space and rerun the same command"
            ) from error
        self.poll()
        if last and self._recording is not None:
            self._recording.result()

    def _failure(self, error: OSError) -> str:
        newest = self.checkpoints.latest()
        kept = newest.name if newest else "no checkpoint"
        return f"cannot write {self.checkpoints.path(self._step)}: {_reason(error)}; {kept} is kept"


def _reason(error: OSError) -> str:
    """What failed, without the remedy: these messages have their own."""
    return error.reason if isinstance(error, DiskFullError) else str(error)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors of the CPU, hashed on the way; returns the file's SHA-256. Raises OSError if
    the disk is full."""
    # keeps every tensor aligned
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = {}
    end = 0
    for name in ordered:
        tensor = tensors[name]
        start = end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _safetensors_dtype(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    length = struct.pack("<Q", len(head))
    contents = (_bytes_of(tensors[name]) for name in ordered)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for content in itertools.chain((length, head), contents):
            for start in range(0, len(content), BLOCK):
                digest.update(content[start : start + BLOCK])
                file.write(content[start : start + BLOCK])
    return digest.hexdigest()


def _safetensors_dtype(dtype: torch.dtype) -> str:
    """As its header spells it: torch.bfloat16 is BF16, torch.uint8 is U8."""
    name = (
        str(dtype)
        .removeprefix("torch.")
        .replace("float", "F")
        .replace("int", "I")
        .upper()
    )
    return name.replace("UI", "U")


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def on_host(name: str, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy in the CPU's memory of the tensor of this name."""
    return value.detach().to("cpu", dtype or value.dtype, copy=True)


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file by name, each read when it is looked up; the file is not mapped in
    between."""

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError, or ContractError if the file is not complete."""
        if not path.is_file():
            raise FileNotFoundError(
                f"{path.name} is missing from {path.parent}; resume from another checkpoint"
            )
        self.path = path
        self._names = read_header(
            path, fix="resume from another checkpoint"
        ).entries.keys()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
