"""Where a training run stands, from the files in its folder alone. Standard library only."""

import json
import os
import shlex
import shutil
import socket
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm2clip_plugin.contracts import CacheManifest, EmbedRecord, EncoderCard, RunRecord, TowerCard, shard_file
from llm2clip_plugin.files import (
    CHECKPOINTS,
    FAILED,
    LOCK,
    METRICS,
    SAVE_FAILED,
    SAVED,
    STOPPED,
    UNFINISHED_HEADS,
    ContractError,
    again,
    headline,
    printable_lines,
    read_header,
)
from llm2clip_plugin.options import Command

# The checkpoints of a run folder, seen without torch: sizes, and whether their files are there and whole.

STATE = "state.json"  # train.checkpoint.TrainState


@dataclass(frozen=True, kw_only=True)
class CheckpointStatus:
    """One checkpoint."""

    name: str
    bytes: int
    problem: str  # "": complete; hashes are compared by a resume, not here


def list_checkpoints(run: Path) -> list[CheckpointStatus]:
    """The checkpoints of a run, oldest first."""
    return [
        CheckpointStatus(name=path.name, bytes=folder_bytes(path), problem=_problem(path))
        for path in sorted((run / CHECKPOINTS).glob("step-*"))
    ]


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder; those that vanish meanwhile count 0."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if not path.is_dir() else 0
        except OSError:
            continue
    return total


def _problem(path: Path) -> str:
    try:
        files = json.loads((path / STATE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"no {STATE}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{STATE} is damaged"
    names = list(files) if isinstance(files, dict) and files else ["model.safetensors", "optimizer.safetensors"]
    for name in names:
        try:
            read_header(path / name)
        except FileNotFoundError:
            return f"no {name}"
        except (OSError, ContractError) as error:
            return f"{name} is damaged: {error}"
    return ""


# What metrics.jsonl tells: the last step, its rate, the scores, and why no more lines follow.

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
    if not step and (folder / UNFINISHED_HEADS).is_file():
        return "stopped", f"in the fit of the heads, before step 1; saved in {UNFINISHED_HEADS}"
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


# Where an embedding cache stands, from its files alone. Standard library only.


@dataclass(frozen=True, kw_only=True)
class CacheStatus:
    """A cache as its folder shows it; what is damaged or missing is in ``problems``."""

    folder: str
    complete: bool  # every shard of the data has its file, and the manifest says so
    done: int  # shards with a file; a file appears when it is complete
    shards: int  # of the data that was embedded last; 0: unknown
    data: str  # "": unknown
    captions: int  # in the manifest; 0 until it is complete
    teacher: str  # name of the LLM; "": unknown
    width: int
    dtype: str
    last_change: float  # of the newest shard's file, seconds since the epoch; 0: none
    used_bytes: int
    free_bytes: int
    go_on: str  # the command; "" if the cache is complete, or nothing was recorded
    problems: list[str]


def cache_status(folder: Path) -> CacheStatus:
    """The status of a cache folder; nothing in it is an error."""
    problems: list[str] = []
    manifest = _read(CacheManifest, folder, problems)
    record = _read(EmbedRecord, folder, problems) if (folder / EmbedRecord.FILE).exists() else None
    names = record.shards if record else list(manifest.shards) if manifest else []
    files = [folder / shard_file(name) for name in names] or list(folder.rglob("*.safetensors"))
    there = [file for file in files if file.is_file()]
    listed = manifest is not None and manifest.complete and set(names) <= set(manifest.shards)
    complete = listed and len(there) == len(files)
    if manifest is not None and (
        lost := [name for name in manifest.shards if not (folder / shard_file(name)).is_file()]
    ):
        problems.append(f"{len(lost)} shards of the manifest have no file, such as {lost[0]}")
    return CacheStatus(
        folder=str(folder),
        complete=complete and not problems,
        done=len(there),
        shards=len(names),
        data=record.data if record else "",
        captions=manifest.captions if manifest else 0,
        teacher=str(manifest.teacher.get("llm", "")) if manifest else "",
        width=manifest.width if manifest else 0,
        dtype=manifest.dtype if manifest else "",
        last_change=max((file.stat().st_mtime for file in there), default=0.0),
        used_bytes=folder_bytes(folder),
        free_bytes=shutil.disk_usage(folder).free,
        go_on="" if complete and not problems else again(record.command) if record else "",
        problems=problems,
    )


def _read(kind: type, folder: Path, problems: list[str]):
    try:
        return kind.read(folder / kind.FILE)
    except (ContractError, OSError) as error:
        problems.append(str(error))
        return None


# ``llm2clip status FOLDER``: where a training run or an embedding cache stands. Imports no torch.

STATES = {
    "running": "running",
    "running elsewhere": "running on another host",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "killed": "ended early",
}


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """What to show."""

    folder: Path  # folder of a run (either stage), or of an embedding cache
    json: bool = False  # print JSON


COMMAND = Command(
    name="status",
    example="llm2clip status runs/photos",
    about="Where a training run or embedding cache stands: progress, scores, checkpoints, disk, the command to resume. "
    "It only reads files, so it is safe while the run is in progress.",
    settings=StatusConfig,
    arguments="folder",
)


def main(argv: list[str]) -> int:
    """Print the status; exit status 0."""
    options = COMMAND.parse(argv)
    status = read_status(options.folder)
    if options.json:
        print(json.dumps(asdict(status), indent=2, ensure_ascii=False))
    else:
        print(printable_lines("\n".join(lines_of(status))))
    return 0


def read_status(folder: Path) -> RunStatus | CacheStatus:
    """Raises FileNotFoundError for a folder that is neither a run's nor a cache."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if (folder / CacheManifest.FILE).exists():
        return cache_status(folder)
    if is_run(folder):
        return run_status(folder)
    raise FileNotFoundError(
        f"{folder} is neither the folder of a run (run.json, {'checkpoints/'}) nor an embedding cache "
        f"({CacheManifest.FILE}); pass the --output of a training, or an embeddings-* folder"
    )


def lines_of(status: RunStatus | CacheStatus) -> list[str]:
    """The status as text."""
    (folder, state), *rows = _run_rows(status) if isinstance(status, RunStatus) else _cache_rows(status)
    width = max(len(name) for name, _ in rows)
    return [f"{folder}: {state}", *(f"  {name:<{width}}  {text}" for name, text in rows if text)]


def _run_rows(status: RunStatus) -> list[tuple[str, str]]:
    rows = [(status.folder, STATES[status.state] + (f": {status.reason}" if status.reason else ""))]
    rows.append(("progress", _progress(status)))
    for name in status.last or status.before:
        parts = [f"before {status.before[name]:.3f}"] if name in status.before else []
        if name in status.best:
            parts.append(f"best {status.best[name][0]:.3f} (step {status.best[name][1]})")
        if name in status.last:
            parts.append(f"last {status.last[name]:.3f} (step {status.last_scored})")
        rows.append((name, ", ".join(parts)))
    for item in status.checkpoints:
        rows.append(("checkpoint", f"{item.name}, {_size(item.bytes)}, {item.problem or 'complete'}"))
    if not status.checkpoints:
        rows.append(("checkpoint", "none yet"))
    for name, problem in status.results.items():
        rows.append(("result", f"{Path(status.folder) / name}{': ' + problem if problem else ''}"))
    if not status.results:
        rows.append(("result", "none yet: the tower or adapter is written at the end"))
    rows.append(("disk", f"{_size(status.used_bytes)} used by the run, {_size(status.free_bytes)} free"))
    rows += [("problem", problem) for problem in status.problems]
    rows.append(("go on", status.go_on))
    return rows


def _progress(status: RunStatus) -> str:
    of = f" of {status.total_steps} ({100 * status.step / status.total_steps:.0f} %)" if status.total_steps else ""
    parts = [f"step {status.step}{of}", f"{status.samples:,} samples"]
    if status.epoch_samples:
        parts.append(f"{status.samples / status.epoch_samples:.2f} epochs")
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4g}")
    if status.seconds_left is not None:
        parts.append(f"{_duration(status.seconds_left)} left at the last rate")
    if status.last_change:
        parts.append(f"last line {ago(status.last_change)}")
    return ", ".join(parts)


def _cache_rows(status: CacheStatus) -> list[tuple[str, str]]:
    done = "complete" if status.complete else "not complete"
    of = f" of {status.shards}" if status.shards else ""
    rows = [(status.folder, f"{done}: {status.done}{of} shards of {status.data or 'its data'}")]
    rows.append(("teacher", f"{status.teacher}, {status.width} wide, {status.dtype}" if status.teacher else ""))
    rows.append(("captions", f"{status.captions:,}" if status.captions else ""))
    rows.append(("last shard", ago(status.last_change)))
    rows.append(("disk", f"{_size(status.used_bytes)} used, {_size(status.free_bytes)} free"))
    rows += [("problem", problem) for problem in status.problems]
    rows.append(("go on", status.go_on))
    return rows


def _size(count: int) -> str:
    """Bytes as people say them, in powers of 10."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"
