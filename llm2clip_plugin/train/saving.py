"""Checkpoints written in the background: training waits while its state is copied, not while it is written.

``Saver.save`` gathers the state on rank 0 and copies it into buffers of the CPU, which later saves use again; a thread
hashes, writes and flushes them. At most one write is in progress, so the host holds one copy of the state. A periodic
save that fails leaves the last checkpoint in place and is tried again; the last one of a run must succeed. No rank
waits for the disk inside a collective.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from llm2clip_plugin.contracts import DiskFullError
from llm2clip_plugin.phases import CHECKPOINT, phase
from llm2clip_plugin.run_files import SAVE_FAILED, SAVED
from llm2clip_plugin.train.checkpoint import MODEL, OPTIMIZER, TrainState
from llm2clip_plugin.train.distributed import on_first_rank, rank, world_size
from llm2clip_plugin.train.run_checkpoints import Checkpoints
from llm2clip_plugin.train.tensor_files import HostCopies

RETRY_SECONDS = 300.0  # after a save that failed


@dataclass(frozen=True, kw_only=True)
class _Write:
    """A write in progress, or the last one."""

    state: TrainState
    tensors: Mapping[str, Mapping[str, Tensor]]
    waited: float  # seconds that training waited
    result: Future[tuple[float, list[str]]]  # seconds of the write, and its warnings


class Saver:
    """Saves a run's checkpoints; leaving the context waits for the write in progress. Every rank needs one."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        engine: Any,
        references: Mapping[str, Any] | None = None,
        *,
        fallback: Path | None = None,
        note: Callable[[str], None] = print,
        event: Callable[[dict[str, Any]], None] = lambda values: None,
    ) -> None:
        """engine: Engine. references: Reference by the name of its file. fallback: run folder for the last checkpoint
        if ``checkpoints`` fails. note: shows a line. event: records a line of metrics.jsonl. Both are called on rank 0,
        by the thread that calls this object."""
        self.checkpoints, self.engine, self.fallback = checkpoints, engine, fallback
        self.references = references or {}
        self.waited = 0.0  # seconds, of the last save
        self._note, self._event = note, event
        self._copies = {name: HostCopies() for name in (MODEL, OPTIMIZER, *self.references)}
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
        copies = self._copies if rank() == 0 else dict.fromkeys(self._copies)
        tensors = {MODEL: self.engine.weights(copies[MODEL]), OPTIMIZER: self.engine.moments(copies[OPTIMIZER])}
        tensors |= {name: reference.values(copies[name]) for name, reference in self.references.items()}
        state = dataclasses.replace(state, **self.engine.scaler_state(), world_size=world_size())
        self.waited, self._retry_at = time.perf_counter() - started, None
        if rank() == 0:
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
        step, error = write.state.step, write.result.exception()
        if isinstance(error, OSError):
            self._retry_at = time.monotonic() + RETRY_SECONDS
            newest = self.checkpoints.latest()
            self._note(
                f"warning: cannot write the checkpoint {self.checkpoints.path(step)}: {_reason(error)}; "
                f"{newest.name if newest else 'no checkpoint'} is kept, trying again in {RETRY_SECONDS / 60:.0f} "
                "minutes at the latest"
            )
            self._event({"step": step, "event": SAVE_FAILED, "reason": _reason(error)})
            return
        seconds, warnings = write.result.result()
        for line in warnings:
            self._note(f"warning: {line}")
        times = {"waited_seconds": round(write.waited, 4), "write_seconds": round(seconds, 4)}
        self._event({"step": step, "event": SAVED, **times})

    def finish(self) -> None:
        """Wait until the last save is complete; every rank must call this.

        Raises OSError (FirstRankError on other ranks) if it failed; its state is then written to ``fallback``.
        """
        with phase(CHECKPOINT):
            on_first_rank(self._finish)

    def _wait(self) -> None:
        """Wait for the write in progress and report it."""
        if self._write is not None:
            wait([self._write.result])
            self.poll()

    def _finish(self) -> None:
        write = self._write
        if write is None:
            return
        error = write.result.exception()  # waits
        if isinstance(error, OSError):
            self._reported = True
            raise OSError(self._give_up(write, error)) from error
        self._wait()
        if self._recording is not None:
            self._recording.result()

    def _give_up(self, write: _Write, error: OSError) -> str:
        """Write the state to the fallback folder; returns what to say."""
        failure = f"cannot write the last checkpoint {self.checkpoints.path(write.state.step)}: {_reason(error)}. "
        if newest := self.checkpoints.latest():
            failure += f"The last complete one is {newest}. "
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


def _write(
    checkpoints: Checkpoints, state: TrainState, tensors: Mapping[str, Mapping[str, Tensor]]
) -> tuple[float, list[str]]:
    started = time.perf_counter()
    warnings = checkpoints.write(state, tensors)
    return time.perf_counter() - started, warnings
