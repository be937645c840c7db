"""What metrics.jsonl tells: the last step, its rate, the scores, and why no more lines follow."""

import json
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm2clip_plugin.run_files import FAILED, SAVE_FAILED, SAVED, STOPPED, headline

RATE_LINES = 20  # last lines of steps that the rate is the mean of


@dataclass(kw_only=True)
class Metrics:
    """A summary of the file; everything is empty without one."""

    step: int = 0  # the last one with a line
    samples: int = 0
    loss: float | None = None
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RATE_LINES))  # of the last steps
    scores: dict[int, dict[str, float]] = field(default_factory=dict)  # step -> headline scores; 0: before training
    ended: dict[str, Any] | None = None  # the event after which no step followed
    save_failed: dict[str, Any] | None = None  # the event after which no checkpoint was complete
    unreadable: int = 0  # lines

    def add(self, line: dict[str, Any]) -> None:
        """Raises ValueError, KeyError or TypeError for a line of another kind."""
        step, event = int(line["step"]), line.get("event")
        if event in (STOPPED, FAILED):
            self.ended = line
        elif event in (SAVE_FAILED, SAVED):
            self.save_failed = line if event == SAVE_FAILED else None
        elif event is None and "loss" in line:
            self.step, self.samples, self.loss, self.ended = step, int(line["samples"]), float(line["loss"]), None
            self.seconds.extend([float(line["step_seconds"])] if "step_seconds" in line else [])
        elif event is None:
            scores = {name: float(value) for name, value in line.items() if name not in ("step", "samples")}
            self.scores[step] = {name: scores[name] for name in headline(scores)}


def read_metrics(path: Path) -> Metrics:
    """Read the file line by line; lines that are damaged, or cut short by a kill, are counted."""
    metrics = Metrics()
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    metrics.add(json.loads(text))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    metrics.unreadable += 1
    return metrics
