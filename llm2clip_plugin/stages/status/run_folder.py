"""Where a training run stands, from the files in its folder alone. Standard library only."""

import json
import os
import shlex
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm2clip_plugin.contracts import ContractError, EncoderCard, RunRecord, TowerCard
from llm2clip_plugin.run_files import LOCK, METRICS, STOPPED, again, headline
from llm2clip_plugin.stages.status.checkpoints import CheckpointStatus, folder_bytes, list_checkpoints
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
    checkpoints: list[CheckpointStatus]
    results: dict[str, str]  # tower or adapter that was written -> "" or what is wrong with it
    used_bytes: int
    free_bytes: int
    go_on: str  # the command; "" if the run is finished or running
    problems: list[str]


def is_run(folder: Path) -> bool:
    """Whether a folder looks like a run's, damaged ones included."""
    return any((folder / name).exists() for name in (RunRecord.FILE, METRICS, LOCK, "checkpoints"))


def run_status(folder: Path) -> RunStatus:
    """The status of a run folder, of either training stage; nothing in it is an error."""
    problems: list[str] = []
    record = _record(folder, problems)
    metrics = read_metrics(folder / METRICS)
    if metrics.unreadable:
        problems.append(f"{metrics.unreadable} unreadable lines in {METRICS}")
    if metrics.save_failed:
        problems.append(f"the last checkpoint could not be written: {metrics.save_failed.get('reason', '')}")
    checkpoints = list_checkpoints(folder)
    step = max(metrics.step, record.step)
    state, reason = _state(folder, record, metrics, step)
    total = record.total_steps
    left = metrics.step_seconds * (total - step) if metrics.step_seconds is not None and total > step else None
    last_scored = max(metrics.scores, default=0)
    return RunStatus(
        folder=str(folder),
        state=state,
        reason=reason,
        step=step,
        total_steps=total,
        samples=max(metrics.samples, record.samples),
        epoch_samples=record.epoch_samples,
        loss=metrics.loss,
        seconds_left=left,
        last_change=max((_changed(folder / name) for name in (METRICS, RunRecord.FILE)), default=0.0),
        before=metrics.before or {name: record.before[name] for name in headline(record.before)},
        best=metrics.best,
        last=metrics.scores.get(last_scored, {}),
        last_scored=last_scored,
        checkpoints=checkpoints,
        results={
            name: _card_problem(folder / name / card) for name, card in RESULTS.items() if (folder / name).is_dir()
        },
        used_bytes=folder_bytes(folder),
        free_bytes=shutil.disk_usage(folder).free,
        go_on="" if state in ("finished", "running", "running elsewhere") else _go_on(folder, record),
        problems=problems,
    )


def _record(folder: Path, problems: list[str]) -> RunRecord:
    try:
        return RunRecord.read(folder / RunRecord.FILE)
    except FileNotFoundError:
        problems.append(f"no {RunRecord.FILE}: the run has not begun, or the file is lost")
    except (ContractError, OSError) as error:
        problems.append(str(error))
    return RunRecord(config={}, config_hash="")


def _state(folder: Path, record: RunRecord, metrics: Metrics, step: int) -> tuple[State, str]:
    holder = _holder(folder / LOCK)
    if holder:
        who = f"process {holder['pid']} on {holder['host']}"
        if holder["host"] != socket.gethostname():
            return "running elsewhere", f"{who}, or killed there"
        if _is_alive(holder["pid"], holder.get("started", 0.0)):
            return "running", who
    if record.finished:
        return "finished", ""
    if metrics.ended:
        state: State = "stopped" if metrics.ended["event"] == STOPPED else "failed"
        when = f", {metrics.ended['time']}" if "time" in metrics.ended else ""
        return state, f"{metrics.ended.get('reason', '')}{when}"
    if not step:
        return "killed", "before step 1"
    return "killed", "no message: killed from outside, out of memory, or the machine went down"


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


def _card_problem(card: Path) -> str:
    try:
        (TowerCard if card.name == TowerCard.FILE else EncoderCard).read(card)
    except (ContractError, OSError) as error:
        return str(error)
    return ""


def _go_on(folder: Path, record: RunRecord) -> str:
    if command := again(record.command):
        return command
    if "tower" in record.config:  # called from Python
        return f"llm2clip train-tower --config {shlex.quote(str(folder / RunRecord.FILE))}"
    return ""


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def ago(seconds_since_epoch: float) -> str:
    """``12 s ago``, ``3 min ago``, or a date; "" for 0."""
    if not seconds_since_epoch:
        return ""
    seconds = time.time() - seconds_since_epoch
    if seconds < 7200:
        return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds_since_epoch))
