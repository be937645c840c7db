"""A trace of a few steps by torch.profiler, and a table of their most expensive operators."""

import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.train.distributed import rank

WARM_UP = 5  # steps before the traced ones, if the run has as many: allocation, compilation, filling queues
OPERATORS = 10  # rows of the table


class StepProfiler:
    """Traces ``steps`` steps of this rank after a warm-up and writes them to ``folder``.

    ``HOST-rankN.TIME.pt.trace.json``: for chrome://tracing, ui.perfetto.dev, and TensorBoard's profiler plugin with
    ``folder`` as its log directory. ``operators-rankN.txt``: the operators with the most time of their own.
    """

    def __init__(self, folder: Path, steps: int, *, remaining: int, note: Callable[[str], object]) -> None:
        """remaining: steps that the run still makes; the trace has no more. note: called with where it was written."""
        self.folder, self.note = folder, note
        traced = min(steps, remaining)
        warm_up = min(WARM_UP, remaining - traced)
        self._left = warm_up + traced  # steps until the trace is complete
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run of few steps has none to warm up
            schedule = torch.profiler.schedule(
                skip_first=max(warm_up - 1, 0), wait=0, warmup=min(warm_up, 1), active=traced, repeat=1
            )
        self._profile: Any = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write)
        self._profile.start()

    def step(self) -> None:
        """A step has ended."""
        if self._profile is not None:
            self._profile.step()
            self._left -= 1
            if not self._left:
                self.close()

    def close(self) -> None:
        """Stop; what was traced of a run that ends early is written."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, profile: Any) -> None:
        table = self.folder / f"operators-rank{rank()}.txt"
        order = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.profiler.tensorboard_trace_handler(str(self.folder), f"{socket.gethostname()}-rank{rank()}")(profile)
            with atomic_file(table) as temporary:
                temporary.write_text(profile.key_averages().table(sort_by=order, row_limit=OPERATORS), encoding="utf-8")
        except (OSError, RuntimeError) as error:
            self.note(f"warning: cannot write the profile to {self.folder}: {error}; training continues")
            return
        self.note(f"profile: trace in {self.folder} (chrome://tracing, TensorBoard), {OPERATORS} operators in {table}")
