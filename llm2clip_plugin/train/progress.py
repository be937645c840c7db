"""What a run reports: metrics.jsonl and a progress bar."""

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.progress import progress_bar

SMOOTHING = 0.9  # of samples per second
SLOW_RANK = 1.2  # a rank that computes so much longer than the fastest one is named

# Values of a step that are labeled time/ for DeepSpeed's monitors; the others are train/, scores are eval/.
TIME_VALUES = {"samples_per_second", "wait_share", "peak_gib", "mfu", "tflops", "slowest_rank"}
TIME_PARTS = ("_seconds", "loader_")


def label(name: str, phase: str) -> str:
    """What monitors call a value of ``phase`` (train, eval, heads): train/loss, time/data_seconds, eval/i2t_r1."""
    is_time = phase == "train" and (name in TIME_VALUES or any(part in name for part in TIME_PARTS))
    return f"{'time' if is_time else phase}/{name}"


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, written by one rank."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        """Drops the lines of steps after ``from_step``, which a killed run made after its last checkpoint."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= from_step]
            with atomic_file(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append one line and flush it."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a line; infinity for a line that was cut short by a kill."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def peak_memory(device: torch.device) -> float:
    """Peak memory so far in GiB: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


class Progress:
    """A bar on stderr: steps, time left, loss, samples/s, held-out recall, peak memory. Silent unless ``show``."""

    def __init__(self, total_steps: int, *, start: int, show: bool) -> None:
        self.show = show = show and total_steps > 0  # heads alone have no steps
        self.values: dict[str, Any] = {}
        self.samples_per_second = 0.0  # smoothed
        self._bar = progress_bar(total=total_steps, label="train", unit="steps", initial=start, show=show, delay=0.0)

    def close(self) -> None:
        """Leave the last state on the terminal."""
        self._bar.close()

    def advance(self, samples: int, seconds: float, values: dict[str, Any]) -> None:
        """Show a finished step of ``samples`` pairs."""
        rate = samples / max(seconds, 1e-9)
        before = self.samples_per_second or rate
        self.samples_per_second = SMOOTHING * before + (1 - SMOOTHING) * rate
        self.values |= values
        self._bar.set_postfix_str(self.description(), refresh=False)
        self._bar.update()

    def show_values(self, values: dict[str, Any]) -> None:
        """Show values that came after the step, such as an evaluation's; the last state of the bar has them, too."""
        self.values |= values
        self._bar.set_postfix_str(self.description())

    def description(self) -> str:
        """``loss 3.21  72 samples/s  MFU 41 %  R@1 image->text 0.123, text->image 0.141  1.9 GiB memory  save 0.4 s``.

        TFLOP/s where the peak is unknown. data: fraction of the step spent waiting for it, from 5 % on. save: how long
        training waited for the last checkpoint. slow: a rank that computes at least 1.2 times as long as the fastest.
        """
        values = self.values
        parts = [f"loss {values['loss']:.4g}"] if "loss" in values else []
        parts.append(f"{self.samples_per_second:.3g} samples/s")
        if "mfu" in values:
            parts.append(f"MFU {100 * values['mfu']:.3g} %")
        elif "tflops" in values:
            parts.append(f"{values['tflops']:.3g} TFLOP/s")
        if values.get("wait_share", 0) >= 0.05:
            parts.append(f"waiting for data {100 * values['wait_share']:.0f} %")
        if "i2t_r1" in values:
            parts.append(f"R@1 image->text {values['i2t_r1']:.3f}, text->image {values['t2i_r1']:.3f}")
        if "peak_gib" in values:
            parts.append(f"{values['peak_gib']:.2f} GiB memory")
        if "save_seconds" in values:
            parts.append(f"save {values['save_seconds']:.1f} s")
        if values.get("busy_seconds_max", 0) > SLOW_RANK * values.get("busy_seconds_min", math.inf):
            parts.append(f"slow: rank {values['slowest_rank']} ({values['slowest_host']})")
        return "  ".join(parts)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self.show:
            self._bar.write(text, file=sys.stderr)
