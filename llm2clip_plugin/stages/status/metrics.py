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
    step_seconds: float | None = None  # of a step, mean of the last lines
    before: dict[str, float] = field(default_factory=dict)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)  # step -> headline scores
    ended: dict[str, Any] | None = None  # the event after which no step followed
    save_failed: dict[str, Any] | None = None  # the event after which no checkpoint was complete
    unreadable: int = 0  # lines

    @property
    def best(self) -> dict[str, tuple[float, int]]:
        """The best value of each headline score after step 0, and its step."""
        found: dict[str, tuple[float, int]] = {}
        for step, scores in self.scores.items():
            for name, value in scores.items():
                if name not in found or value > found[name][0]:
                    found[name] = (value, step)
        return found


def read_metrics(path: Path) -> Metrics:
    """Read the file line by line; lines that are damaged, or cut short by a kill, are counted."""
    metrics = Metrics()
    if not path.is_file():
        return metrics
    seconds: deque[float] = deque(maxlen=RATE_LINES)
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
                _add(metrics, line, seconds)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                metrics.unreadable += 1
    metrics.step_seconds = sum(seconds) / len(seconds) if seconds else None
    return metrics


def _add(metrics: Metrics, line: dict[str, Any], seconds: deque[float]) -> None:
    step = int(line["step"])
    event = line.get("event")
    if event in (STOPPED, FAILED):
        metrics.ended = line
    elif event == SAVE_FAILED:
        metrics.save_failed = line
    elif event == SAVED:
        metrics.save_failed = None
    elif event is None and "loss" in line:
        metrics.step, metrics.samples, metrics.loss = step, int(line["samples"]), float(line["loss"])
        metrics.ended = None
        if "step_seconds" in line:
            seconds.append(float(line["step_seconds"]))
    elif event is None:
        scores = {name: float(value) for name, value in line.items() if name not in ("step", "samples")}
        scores = {name: scores[name] for name in headline(scores)}
        if step:
            metrics.scores[step] = scores
        else:
            metrics.before = scores
