"""Where a training run stands, from the files in its folder alone. Standard library only."""

import json
import os
import shlex
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm2clip_plugin.contracts import ContractError, EncoderCard, RunRecord, TowerCard
from llm2clip_plugin.run_files import CHECKPOINTS, LOCK, METRICS, STOPPED, UNFINISHED_HEADS, again, headline
from llm2clip_plugin.stages.status.metrics import Metrics, read_metrics

State = Literal["running", "running elsewhere", "finished", "stopped", "failed", "killed"]
RESULTS = {"tower": TowerCard.FILE, "tower-ema": TowerCard.FILE, "adapter": EncoderCard.FILE}  # folder -> its card


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run as its folder shows it; what is damaged or missing is in ``problems``."""

    folder: str
    state: State
    reason: str  # why it runs no more, or what runs it
    step: int
    total_steps: int  # 0: unknown
    samples: int
    epoch_samples: int  # 0: unknown
    loss: float | None
    seconds_left: float | None
    last_change: float  # of metrics.jsonl or run.json, seconds since the epoch; 0: never
    before: dict[str, float]
    best: dict[str, tuple[float, int]]  # score -> value, step
    last: dict[str, float]
    last_scored: int  # step of ``last``
    checkpoints: list[str]  # oldest first
    results: list[str]  # folders that were written
    go_on: str  # the command; "" if the run is finished or running
    problems: list[str]


def is_run(folder: Path) -> bool:
    """Whether a folder looks like a run's, damaged ones included."""
    return any((folder / name).exists() for name in (RunRecord.FILE, METRICS, LOCK, CHECKPOINTS))


def run_status(folder: Path) -> RunStatus:
    """The status of a run folder, of either training stage; nothing in it is an error."""
    problems: list[str] = []
    try:
        record = RunRecord.read(folder / RunRecord.FILE)
    except (ContractError, OSError) as error:
        problems.append(str(error))
        record = RunRecord(config={}, config_hash="")
    metrics = read_metrics(folder / METRICS)
    if metrics.unreadable:
        problems.append(f"{metrics.unreadable} unreadable lines in {METRICS}")
    if metrics.save_failed:
        problems.append(f"the last checkpoint could not be written: {metrics.save_failed.get('reason', '')}")
    step, total = max(metrics.step, record.step), record.total_steps
    state, reason = _state(folder, record, metrics, step)
    rate = sum(metrics.seconds) / len(metrics.seconds) if metrics.seconds else None  # seconds of a step
    scored = {at: scores for at, scores in metrics.scores.items() if at}
    by_name = [(name, value, at) for at, scores in scored.items() for name, value in scores.items()]
    last_scored = max(scored, default=0)
    files = [path for name in (METRICS, RunRecord.FILE) if (path := folder / name).is_file()]
    return RunStatus(
        folder=str(folder),
        state=state,
        reason=reason,
        step=step,
        total_steps=total,
        samples=max(metrics.samples, record.samples),
        epoch_samples=record.epoch_samples,
        loss=metrics.loss,
        seconds_left=rate * (total - step) if rate is not None and total > step else None,
        last_change=max((path.stat().st_mtime for path in files), default=0.0),
        before=metrics.scores.get(0) or {name: record.before[name] for name in headline(record.before)},
        best={name: (value, at) for name, value, at in sorted(by_name, key=lambda each: (each[1], -each[2]))},
        last=scored.get(last_scored, {}),
        last_scored=last_scored,
        checkpoints=sorted(path.name for path in (folder / CHECKPOINTS).glob("step-*")),
        results=[name for name, card in RESULTS.items() if (folder / name / card).is_file()],
        go_on="" if state in ("finished", "running", "running elsewhere") else _go_on(folder, record),
        problems=problems,
    )


def _state(folder: Path, record: RunRecord, metrics: Metrics, step: int) -> tuple[State, str]:
    holder = _holder(folder / LOCK)
    if holder:
        who = f"process {holder['pid']} on {holder['host']}"
        if holder["host"] != socket.gethostname():
            return "running elsewhere", f"{who}, or killed there"
        if _is_alive(holder["pid"], holder["started"]):
            return "running", who
    if record.finished:
        return "finished", ""
    if not step and (folder / UNFINISHED_HEADS).is_file():
        return "stopped", f"in the fit of the heads, before step 1; saved in {UNFINISHED_HEADS}"
    if metrics.ended:
        when = f", {metrics.ended['time']}" if "time" in metrics.ended else ""
        return "stopped" if metrics.ended["event"] == STOPPED else "failed", metrics.ended.get("reason", "") + when
    return (
        "killed",
        "no message: killed from outside, out of memory, or the machine went down" if step else "before step 1",
    )


def _holder(path: Path) -> dict[str, Any]:
    """Who the lock names; {} without one, or for a damaged one."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return {"host": str(holder["host"]), "pid": int(holder["pid"]), "started": float(holder["started"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_alive(pid: int, started: float) -> bool:
    """Whether a process of this host exists; where psutil is installed, also whether it is the same one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # another user's
    try:
        import psutil
    except ModuleNotFoundError:
        return True
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1
    except psutil.Error:
        return False


def _go_on(folder: Path, record: RunRecord) -> str:
    if command := again(record.command):
        return command
    if "tower" in record.config:  # called from Python
        return f"llm2clip train-tower --config {shlex.quote(str(folder / RunRecord.FILE))}"
    return ""


def ago(seconds_since_epoch: float) -> str:
    """``12 s ago``, ``3 min ago``, or a date; "" for 0."""
    if not seconds_since_epoch:
        return ""
    seconds = time.time() - seconds_since_epoch
    if seconds < 7200:
        return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds_since_epoch))
