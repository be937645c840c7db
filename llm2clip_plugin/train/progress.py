"""What a run tells: metrics.jsonl, and a progress bar (rich where it is installed, plain lines else)."""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from llm2clip_plugin.contracts import whole_file

PLAIN_EVERY = 10.0  # seconds between lines where stderr is no terminal
SMOOTHING = 0.9  # of samples a second


class MetricsFile:
    """``metrics.jsonl``, one object a line, written by one rank."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        """Lines of steps after ``from_step`` are dropped: a killed run had gone on past its last checkpoint."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= from_step]
            with whole_file(path) as aside:
                aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def peak_memory(device: torch.device) -> float:
    """GiB at the highest so far: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


class Progress:
    """A bar on stderr: step, samples/s, loss, held-out recall, peak memory, time left. Silent off rank 0."""

    def __init__(self, total_steps: int, *, start: int, show: bool) -> None:
        self.total, self.step = total_steps, start
        self.show = show
        self.said = 0.0
        self.values: dict[str, float] = {}
        self.rate = 0.0  # samples a second, smoothed
        self._bar = _rich_bar(total_steps, start) if show and sys.stderr.isatty() else None
        self._seconds_a_step = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int, samples: int, seconds: float, values: dict[str, float]) -> None:
        """Show a finished step of ``samples`` pairs."""
        rate = samples / max(seconds, 1e-9)
        first = self.rate == 0.0
        self.rate = rate if first else SMOOTHING * self.rate + (1 - SMOOTHING) * rate
        self._seconds_a_step = seconds if first else SMOOTHING * self._seconds_a_step + (1 - SMOOTHING) * seconds
        self.step = step
        self.values |= values
        if not self.show:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, told=self.told())
        elif step == self.total or time.monotonic() - self.said > PLAIN_EVERY:
            self.said = time.monotonic()
            print(f"step {step}/{self.total} {self.told()}, {self.left():.0f} s left", file=sys.stderr, flush=True)

    def left(self) -> float:
        """Seconds to the end at the present pace."""
        return (self.total - self.step) * self._seconds_a_step

    def told(self) -> str:
        """``loss 3.21  72 samples/s  R@1 0.12/0.14  1.9 GiB``."""
        parts = [f"loss {self.values['loss']:.4g}" if "loss" in self.values else "", f"{self.rate:.3g} samples/s"]
        if "i2t_r1" in self.values:
            parts.append(f"R@1 {self.values['i2t_r1']:.3f}/{self.values['t2i_r1']:.3f}")
        if "peak_gib" in self.values:
            parts.append(f"{self.values['peak_gib']:.2f} GiB")
        return "  ".join(part for part in parts if part)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self.show and self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self.show:
            print(text, file=sys.stderr, flush=True)


def _rich_bar(total: int, start: int) -> Any:
    """A started rich bar, or None where rich is not installed (LLaVA's environment)."""
    if importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True))
    bar.add_task("train", total=total, completed=start, told="")
    bar.start()
    return bar
