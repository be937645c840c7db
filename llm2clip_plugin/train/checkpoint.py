"""A checkpoint: one folder, complete or absent, whose files are hashed while they are written.

    step-00000120/
      model.safetensors      every parameter (trained ones in fp32) and buffer, by the module's own names
      optimizer.safetensors  NAME.exp_avg and NAME.exp_avg_sq
      ema.safetensors        moving averages, if train.ema_decay is set
      twin.safetensors       the frozen twin, if a loss term needs one
      state.json             TrainState: step, samples, updates, loss scale, configuration, SHA-256 of the other files

The format is independent of the number of ranks, the ZeRO stage and the precision, except for the moments of an
optimizer ``by_rank`` (optimizers/base.py). No generator state is saved: every random draw is a function of the run's
seed and a position in its order of samples (step.py).
"""

import dataclasses
import hashlib
import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from llm2clip_plugin.console import CHECKPOINT, phase, progress_bar
from llm2clip_plugin.contracts import (
    DiskFullError,
    RunRecord,
    VersionedRecord,
    atomic_directory,
    atomic_file,
    canonical_json,
    sha256_text,
    size_text,
)
from llm2clip_plugin.files import (
    CHECKPOINTS,
    LATEST,
    METRICS,
    PROGRESS,
    SAVE_FAILED,
    SAVED,
    ContractError,
    read_header,
    tell_job,
)
from llm2clip_plugin.train.config import OptimConfig
from llm2clip_plugin.train.distributed import on_first_rank, rank, world_size
from llm2clip_plugin.train.optim import Trained

# safetensors files that are hashed while they are written, and read one tensor at a time without a memory map.

BLOCK = 1 << 24  # bytes that are hashed and written at a time
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors of the CPU; returns the file's SHA-256. Raises OSError if the disk is full."""
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    header, end = {}, 0
    for name in ordered:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in (struct.pack("<Q", len(head)), head):
            digest.update(block)
            file.write(block)
        for name in ordered:
            content = _bytes_of(tensors[name].contiguous())
            for start in range(0, len(content), BLOCK):
                digest.update(content[start : start + BLOCK])
                file.write(content[start : start + BLOCK])
    return digest.hexdigest()


class HostCopies:
    """Copies tensors to the CPU, into the memory of the copies that it made under the same names before."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of ``value``, valid until the next call with this name."""
        buffer, dtype = self._buffers.get(name), dtype or value.dtype
        if buffer is None or buffer.shape != value.shape or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(value.shape, dtype=dtype)
        return buffer.copy_(value.detach())


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file by name, each read when it is looked up; no descriptor stays open in between."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises ContractError if it doesn't fit the file."""
        self.path = path
        header = read_header(path, fix="resume from another checkpoint")
        if unknown := {entry.dtype for entry in header.entries.values()} - {*DTYPES}:
            raise ContractError(f"{path} has tensors of type {', '.join(sorted(unknown))}; known: {', '.join(DTYPES)}")
        self._start = header.data_start
        self._entries = header.entries

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        value = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        content, done = _bytes_of(value), 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._start + entry.start)
            while done < len(content):
                count = file.readinto(content[done : done + BLOCK])
                if not count:
                    raise ContractError(f"{self.path} ends inside {name}; resume from another checkpoint")
                done += count
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


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
    checksum: str = ""  # of the fields above

    def sealed(self) -> "TrainState":
        """With its checksum."""
        return dataclasses.replace(self, checksum=self._digest())

    def check(self, where: Path) -> None:
        """Raises ContractError if a field was changed after it was written."""
        if self.checksum != self._digest():
            raise ContractError(f"{where} is damaged: its fields do not have the checksum {self.checksum!r}")

    def _digest(self) -> str:
        return sha256_text(canonical_json({**dataclasses.asdict(self), "checksum": ""}))


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
        dataclasses.replace(state, files=files).sealed().write(temporary / TrainState.FILE)


def record_metrics(path: Path, state: TrainState) -> None:
    """Put the evaluation of ``state`` into the checkpoint of its step. Raises OSError."""
    saved = TrainState.read(path / TrainState.FILE)
    values = {"metrics": state.metrics, "evaluated": state.evaluated}
    dataclasses.replace(saved, **values).sealed().write(path / TrainState.FILE)


def verify(path: Path, *, moments: bool = True) -> None:
    """Read a checkpoint once and compare its hashes; without ``moments``, not the optimizer's file.

    Raises FileNotFoundError or ContractError naming the file that is missing or damaged.
    """
    state = TrainState.read(path / TrainState.FILE)
    state.check(path / TrainState.FILE)
    names = [name for name in state.files if moments or name != OPTIMIZER]
    for name in names:
        _open(path, name)
    total = sum((path / name).stat().st_size for name in names)
    bar = progress_bar(total=total >> 20, label=f"checking {path.name}", unit="MiB")
    with bar, ThreadPoolExecutor(len(names)) as pool:
        digests = pool.map(lambda name: _sha256(path / name, lambda done: bar.update(done >> 20)), names)
        for name, digest in zip(names, digests, strict=True):
            if digest != state.files[name]:
                raise ContractError(
                    f"{path / name} is damaged: its SHA-256 is {digest[:12]}..., {TrainState.FILE} says "
                    f"{state.files[name][:12]}..."
                )


def _sha256(path: Path, advance: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


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
    if missing := sorted(own.keys() ^ weights.keys()):
        raise ContractError(f"{where} does not fit the model: only one of them has {', '.join(missing[:5])}")
    for name, value in own.items():
        saved = weights[name]
        if saved.shape != value.shape:
            raise ContractError(f"{where}: {name} has shape {tuple(saved.shape)}, expected {tuple(value.shape)}")
        value.copy_(saved)


# The checkpoints of a run folder: which one to resume from, which to keep.

RESUME_AUTO, RESUME_NEVER = "auto", "never"


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_folder: Path, *, keep: int) -> None:
        """keep: number of checkpoints to keep, 0 for all."""
        self.run_folder = run_folder
        self.folder = run_folder / CHECKPOINTS
        self.keep = keep

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def write(self, state: TrainState, tensors: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
        """Write a checkpoint of tensors by file, then remove old ones; returns warnings. Raises OSError."""
        target = self.path(state.step)
        write_checkpoint(target, state, tensors)
        with atomic_file(self.folder / LATEST) as temporary:
            temporary.write_text(target.name + "\n", encoding="utf-8")
        tell_job(PROGRESS)
        return self._prune(target)

    def record_metrics(self, state: TrainState) -> None:
        """Put an evaluation into the checkpoint of its step, if there is one. Raises OSError."""
        if self.path(state.step).is_dir():
            record_metrics(self.path(state.step), state)

    def _prune(self, newest: Path) -> list[str]:
        """Remove all but the newest ``keep`` checkpoints, and what a killed run left; returns what failed.

        A checkpoint is renamed first: half removed, it could be taken for a complete one. What fails is tried again
        after the next save.
        """
        older = [path for path in sorted(self.folder.glob("step-*")) if path.name < newest.name]
        warnings = []
        for path in older[: max(0, len(older) + 1 - self.keep)] if self.keep else []:
            try:
                os.replace(path, path.with_name(f".{path.name}.{time.time_ns():x}.old"))
            except OSError as error:
                warnings.append(f"cannot remove the old checkpoint {path}: {error}")
        for leftover in [*self.folder.glob(".*.tmp"), *self.folder.glob(".*.old")]:
            try:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            except OSError as error:
                warnings.append(f"cannot remove {leftover}: {error}; trying again after the next save")
        return warnings

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None if there is none; its content is not verified."""
        names = self.names()
        return self.folder / names[-1] if names else None

    def names(self) -> list[str]:
        """Names of the complete checkpoints, oldest first."""
        return sorted(path.parent.name for path in self.folder.glob(f"step-*/{TrainState.FILE}"))

    def find(self, resume: str, *, moments: bool = True, option: str = "--resume") -> Path | None:
        """The checkpoint for a value of ``--resume``: auto (newest of this run, if any), never (None), or a path.

        It is verified; ``auto``, and the path of a run, fall back to an older one with a warning on stderr. Raises
        FileNotFoundError for a path without a checkpoint, which is the value of ``option``, and for a run that has
        lost its checkpoints, ContractError if all are damaged or the named one is, FileExistsError for ``never`` if
        any exist.
        """
        if resume == RESUME_AUTO:
            found = self._newest_intact(moments)
            return found if found is not None else self._none_yet()
        if resume == RESUME_NEVER:
            if self.names():
                raise FileExistsError(
                    f"{self.folder} contains {self.names()}; refusing to overwrite with --resume never: choose another "
                    "--output, or delete the folder"
                )
            return None
        path = Path(resume)
        if not (path / TrainState.FILE).is_file():
            newest = Checkpoints(path, keep=0)._newest_intact(moments) if path.is_dir() else None
            if newest is None:
                raise FileNotFoundError(
                    f"{option} {resume}: no checkpoint found (no {TrainState.FILE}){self._others(path)}"
                )
            return newest
        try:
            verify(path, moments=moments)
        except (ContractError, FileNotFoundError) as error:
            raise ContractError(f"{error}{self._others(path)}") from error
        return path

    def _others(self, path: Path) -> str:
        others = [name for name in self.names() if self.folder / name != path]
        return f"; available checkpoints of this run: {others}" if others else ""

    def _newest_intact(self, moments: bool) -> Path | None:
        """The newest checkpoint that is verified, with a warning if a newer one is damaged; None if there is none."""
        paths = sorted(self.folder.glob("step-*"), reverse=True)
        pointer = self.folder / LATEST
        named = self.folder / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None
        damaged = []
        if named is not None and named not in paths:
            damaged.append(f"{pointer} refers to {named}, which does not exist")
        for path in paths:
            try:
                verify(path, moments=moments)
            except (ContractError, OSError) as error:
                damaged.append(str(error))
                continue
            if damaged:
                print(f"warning: {'; '.join(damaged)}\nwarning: falling back to {path}", file=sys.stderr)
            return path
        if damaged:
            raise ContractError(
                f"no checkpoint in {self.folder} is intact: {'; '.join(damaged)}. Restore one, or start over with "
                f"another --output"
            )
        return None

    def _none_yet(self) -> None:
        """Raise FileNotFoundError if this run has saved a checkpoint that is gone now."""
        record = self.run_folder / RunRecord.FILE
        step = RunRecord.read(record).step if record.is_file() else 0
        metrics = self.run_folder / METRICS
        if not step and metrics.is_file():
            lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
            step = max((_saved_step(line) for line in lines if SAVED in line), default=0)
        if step:
            raise FileNotFoundError(
                f"{self.folder} has no checkpoint, but the run in {self.run_folder} had saved step {step}: restore the "
                "checkpoints, choose another --output, or start over with --resume never (replaces its metrics "
                "and results)"
            )

    def move_aside(self, resumed: Path | None) -> str:
        """Move what a run does not continue from to ``abandoned-*``: checkpoints newer than ``resumed``, all if that
        is in another folder; returns a line about it, "" if there are none. Raises OSError."""
        names = sorted(path.name for path in self.folder.glob("step-*"))
        if resumed is not None and resumed.resolve().parent == self.folder.resolve():
            names = [name for name in names if name > resumed.name]
        if not names:
            return ""
        aside = self.folder / f"abandoned-{time.strftime('%Y%m%d-%H%M%S')}"
        while aside.exists():
            aside = aside.with_name(f"{aside.name}x")
        aside.mkdir()
        for name in names:
            os.replace(self.folder / name, aside / name)
        if (self.run_folder / METRICS).is_file():
            shutil.copy2(self.run_folder / METRICS, aside)
        if resumed is not None and resumed.resolve().parent == self.folder.resolve():
            with atomic_file(self.folder / LATEST) as temporary:
                temporary.write_text(resumed.name + "\n", encoding="utf-8")
        return f"moved {', '.join(names)} to {aside}; delete that folder when you no longer need it"


def _saved_step(line: str) -> int:
    """The step of a line of metrics.jsonl that says that a checkpoint is complete; 0 for another line."""
    try:
        values = json.loads(line)
        return int(values["step"]) if values.get("event") == SAVED else 0
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0


# Whether a run's first checkpoint fits on the disk, computed before the first step.


def checkpoint_bytes(
    module: nn.Module, trained: Iterable[Trained], optim: OptimConfig, *, averages: int, keep_frozen: bool
) -> int:
    """Size of a checkpoint: fp32 weights, the optimizer's states, and moving averages.

    averages: copies of the weights that follow them (train.ema_decay, a frozen twin). keep_frozen: what is frozen is
    saved, too.
    """
    own = sum(item.parameter.numel() for item in trained)
    states = own * (4 + optim.optimizer().state_bytes + 4 * averages)
    frozen = [p.numel() * 4 for p in module.parameters() if not p.requires_grad]
    return int(states + sum(frozen) * keep_frozen)


def check_space(folder: Path, needed: int, *, fallback: str = "") -> None:
    """Raise OSError if neither ``folder``, which exists, nor the fallback's disk has ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free >= needed or (fallback and shutil.disk_usage(_existing(Path(fallback))).free >= needed):
        return
    raise OSError(
        f"a checkpoint of this run takes {size_text(needed)}, but {folder} has {size_text(free)} free; free space, or "
        "choose an --output on another disk"
    )


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = Path(os.path.abspath(path))
    return path if path.exists() else _existing(path.parent)


# Checkpoints written in the background: training waits while its state is copied, not while it is written.

RETRY_SECONDS = 300.0  # after a save that failed
PATIENCE = 10.0  # seconds of waiting for a write before a line is printed


class HasState(Protocol):
    """The part of an engine that is saved; see EngineStates."""

    def weights(self, copy: HostCopies | None) -> dict[str, Tensor]: ...

    def moments(self, copy: HostCopies | None) -> dict[str, Tensor]: ...

    def scaler_state(self) -> dict[str, Any]: ...


class HasAverages(Protocol):
    """Values that follow the weights; see MovingAverage and Twin."""

    def values(self, copy: HostCopies | None) -> dict[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Written:
    """A checkpoint that is complete."""

    path: Path
    seconds: float
    warnings: list[str]


@dataclass(frozen=True, kw_only=True)
class _Write:
    """A write in progress, or the last one."""

    state: TrainState
    tensors: Mapping[str, Mapping[str, Tensor]]
    waited: float  # seconds that training waited
    result: Future[Written]


class Saver:
    """Saves a run's checkpoints; leaving the context waits for the write in progress. Every rank needs one."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        engine: HasState,
        average: HasAverages | None = None,
        twin: HasAverages | None = None,
        *,
        fallback: Path | None = None,
        note: Callable[[str], None] = print,
        event: Callable[[dict[str, Any]], None] = lambda values: None,
    ) -> None:
        """fallback: run folder for the last checkpoint if ``checkpoints`` fails. note: shows a line. event: records
        a line of metrics.jsonl. Both are called on rank 0, by the thread that calls this object."""
        self.checkpoints, self.engine, self.fallback = checkpoints, engine, fallback
        self.averages = {n: followed for n, followed in ((AVERAGES, average), (TWIN, twin)) if followed is not None}
        self.waited = 0.0  # seconds, of the last save
        self._note, self._event = note, event
        self._copies = {name: HostCopies() for name in (MODEL, OPTIMIZER, *self.averages)}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write: _Write | None = None
        self._reported = True
        self._recording: Future[None] | None = None
        self._retry_at: float | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with phase(CHECKPOINT):
            self._thread.shutdown(wait=kind is not KeyboardInterrupt)
        self.poll()

    @property
    def busy(self) -> bool:
        """Whether a write is in progress; False on ranks that do not write."""
        self.poll()
        return not self._reported

    @property
    def retry_due(self) -> bool:
        """Whether it is time to try a failed save again."""
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def save(self, state: TrainState, *, last: bool = False) -> None:
        """Copy the state and start to write it; every rank must call this, and none while one is busy unless this is
        the ``last`` save, which waits for the write in progress."""
        started = time.perf_counter()
        if last:
            with phase(CHECKPOINT):
                on_first_rank(self._wait)
        first = rank() == 0
        copies = self._copies if first else dict.fromkeys(self._copies)
        tensors = {MODEL: self.engine.weights(copies[MODEL]), OPTIMIZER: self.engine.moments(copies[OPTIMIZER])}
        tensors |= {name: average.values(copies[name]) for name, average in self.averages.items()}
        state = dataclasses.replace(
            state, **self.engine.scaler_state(), world_size=world_size(), evaluated=state.evaluated
        )
        self.waited, self._retry_at = time.perf_counter() - started, None
        if first:
            result = self._thread.submit(_write, self.checkpoints, state, tensors)
            self._write, self._reported = _Write(state=state, tensors=tensors, waited=self.waited, result=result), False

    def record_metrics(self, state: TrainState) -> None:
        """Put the evaluation of the last saved step into its checkpoint, in the background."""
        if rank() == 0:
            self._recording = self._thread.submit(self.checkpoints.record_metrics, state)

    def poll(self) -> None:
        """Report a write that has ended since the last call."""
        write = self._write
        if write is None or self._reported or not write.result.done():
            return
        self._reported = True
        error = write.result.exception()
        if isinstance(error, OSError):
            self._retry_at = time.monotonic() + RETRY_SECONDS
            newest = self.checkpoints.latest()
            kept = f"{newest.name} is kept" if newest else "there is no other checkpoint yet"
            target = self.checkpoints.path(write.state.step)
            self._note(
                f"warning: cannot write the checkpoint {target}: {_reason(error)}; {kept}, "
                f"trying again at the next save, or in {RETRY_SECONDS / 60:.0f} minutes"
            )
            self._event({"step": write.state.step, "event": SAVE_FAILED, "reason": _reason(error)})
            return
        written = write.result.result()
        for line in written.warnings:
            self._note(f"warning: {line}")
        self._event(
            {
                "step": write.state.step,
                "event": SAVED,
                "waited_seconds": round(write.waited, 4),
                "write_seconds": round(written.seconds, 4),
            }
        )

    def finish(self) -> None:
        """Wait until the last save is complete; every rank must call this.

        Raises OSError (FirstRankError on other ranks) if it failed; its state is then written to ``fallback``.
        """
        with phase(CHECKPOINT):
            on_first_rank(self._finish)

    def _wait(self) -> None:
        """Wait for the write in progress and report it."""
        if self._write is not None and not self._reported:
            if not wait([self._write.result], timeout=PATIENCE).done:
                self._note(f"waiting for {self.checkpoints.path(self._write.state.step)} to be written")
            wait([self._write.result])
            self.poll()

    def _finish(self) -> None:
        write = self._write
        if write is None:
            return
        wait([write.result])
        error = write.result.exception()
        if isinstance(error, OSError):
            self._reported = True
            raise OSError(self._give_up(write, error)) from error
        self._wait()
        if self._recording is not None:
            self._recording.result()

    def _give_up(self, write: _Write, error: OSError) -> str:
        """Write the state to the fallback folder; returns what to say."""
        target = self.checkpoints.path(write.state.step)
        newest = self.checkpoints.latest()
        kept = f"The last complete one is {newest}. " if newest else ""
        failure = f"cannot write the last checkpoint {target}: {_reason(error)}. {kept}"
        if self.fallback is None:
            return (
                f"{failure}Free space and rerun the same command to resume from it; --save-fallback-dir DIR on "
                "another disk keeps the last state in such a case"
            )
        elsewhere = Checkpoints(self.fallback, keep=0)
        try:
            elsewhere.write(write.state, write.tensors)
        except OSError as second:
            return f"{failure}Writing it to {elsewhere.path(write.state.step)} failed, too: {_reason(second)}"
        return f"{failure}Its state is in {elsewhere.path(write.state.step)}: resume with --resume {self.fallback}"


def _reason(error: OSError) -> str:
    """What failed, without the remedy: these messages have their own."""
    return error.reason if isinstance(error, DiskFullError) else str(error)


def _write(checkpoints: Checkpoints, state: TrainState, tensors: Mapping[str, Mapping[str, Tensor]]) -> Written:
    started = time.perf_counter()
    warnings = checkpoints.write(state, tensors)
    return Written(path=checkpoints.path(state.step), seconds=time.perf_counter() - started, warnings=warnings)
