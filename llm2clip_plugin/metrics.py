"""The events of a run in metrics.jsonl, read line by line and summed up."""

import json
import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from llm2clip_plugin import run_folder

RATE_LINES = 20  # last lines of steps in metrics.jsonl that rates are the means of


@dataclass(kw_only=True)
class Metrics:
    """A summary of metrics.jsonl."""

    step: int = 0  # the last one with a line
    samples: int = 0
    loss: float | None = None
    # of the last steps
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RATE_LINES))
    # images/s of a loader process, and of steps that wait for no data, of the last lines
    loading: deque[tuple[float, float]] = field(
        default_factory=lambda: deque(maxlen=RATE_LINES)
    )
    # step -> headline scores; 0: before training
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    ended: dict[str, Any] | None = None  # the event after which no step followed
    # the event after which no checkpoint was complete
    save_failed: dict[str, Any] | None = None
    unreadable: int = 0  # lines

    def add(self, line: dict[str, Any]) -> None:
        """Raises ValueError, KeyError or TypeError for a line of another kind."""
        step = int(line["step"])
        event = line.get("event")
        if event in (run_folder.STOPPED, run_folder.FAILED):
            self.ended = line
        elif event in (run_folder.SAVE_FAILED, run_folder.SAVED):
            self.save_failed = line if event == run_folder.SAVE_FAILED else None
        elif event is None and "loss" in line:
            self.step = step
            self.samples = int(line["samples"])
            self.loss = float(line["loss"])
            self.ended = None
            if "step_seconds" in line:
                self.seconds.append(float(line["step_seconds"]))
            if loader_rate := line.get("loader_images_per_second"):
                busy_share = max(1 - line["wait_share"], 1e-3)
                needed_rate = line["samples_per_second"] / busy_share
                self.loading.append((float(loader_rate), needed_rate))
        elif event is None:
            scores: dict[str, float] = {}
            for name, value in line.items():
                if name not in ("step", "samples"):
                    scores[name] = float(value)
            self.scores[step] = {
                name: scores[name] for name in run_folder.headline(scores)
            }

    def loader(self) -> str:
        """How many loader processes the steps need, over all ranks; "" if no line says."""
        if not self.loading:
            return ""
        loader_rate, needed = (
            median(column) for column in zip(*self.loading, strict=True)
        )
        count = math.ceil(needed / loader_rate)
        return (
            f"one process reads {loader_rate:,.1f} images/s, the steps take {needed:,.1f}: "
            f"they need {count} loader processes (--workers times ranks)"
        )


def read_metrics(path: Path) -> Metrics:
    """Read the file line by line; lines that are damaged, or cut short by a kill, are counted."""
    metrics = Metrics()
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    metrics.add(json.loads(text))
                except (
                    ValueError,
                    KeyError,
                    TypeError,
                    AttributeError,
                    RecursionError,
                ):
                    metrics.unreadable += 1
    return metrics
