"""``llm2clip status``: where a run or a cache stands, from the files in its folder alone."""

import json
import socket
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llm2clip_plugin import files
from llm2clip_plugin.contracts import CacheManifest, EmbedRecord, EncoderCard, RunRecord, TowerCard, shard_file
from llm2clip_plugin.options import Command, command

RATE_LINES = 20  # last lines of steps that the rate is the mean of
RESULTS = {"tower": TowerCard.FILE, "tower-ema": TowerCard.FILE, "adapter": EncoderCard.FILE}  # folder -> its card
SHOWN = {"running elsewhere": "running on another host", "killed": "ended early"}  # states -> their text


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
    """Print the status; exit status 0. Raises FileNotFoundError for a folder that is neither a run's nor a cache."""
    options = COMMAND.parse(argv)
    folder = options.folder
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if (folder / CacheManifest.FILE).exists():
        status, rows_of = cache_status(folder), _cache_rows
    elif any((folder / name).exists() for name in (RunRecord.FILE, files.METRICS, files.LOCK, files.CHECKPOINTS)):
        status, rows_of = run_status(folder), _run_rows
    else:
        raise FileNotFoundError(
            f"{folder} is neither the folder of a run (run.json, checkpoints/) nor an embedding cache "
            f"({CacheManifest.FILE}); pass the --output of a training, or an embeddings-* folder"
        )
    if options.json:
        print(json.dumps(vars(status), indent=2, ensure_ascii=False))
    else:
        (name, state), *rows = rows_of(status)
        rows += [*(("problem", problem) for problem in status.problems), ("go on", status.go_on)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name}: {state}", *(f"  {name:<{width}}  {text}" for name, text in rows if text)]
        print(files.printable_lines("\n".join(lines)))
    return 0


def _run_rows(status: SimpleNamespace) -> list[tuple[str, str]]:
    reason = f": {status.reason}" if status.reason else ""
    rows = [(status.folder, f"{SHOWN.get(status.state, status.state)}{reason}"), ("progress", _progress(status))]
    for name in status.last or status.before:
        parts = [f"before {status.before[name]:.3f}"] if name in status.before else []
        if name in status.best:
            parts.append(f"best {status.best[name][0]:.3f} (step {status.best[name][1]})")
        if name in status.last:
            parts.append(f"last {status.last[name]:.3f} (step {status.last_scored})")
        rows.append((name, ", ".join(parts)))
    results = ", ".join(str(Path(status.folder) / name) for name in status.results)
    rows.append(("checkpoints", ", ".join(status.checkpoints) or "none yet"))
    rows.append(("result", results or "none yet: the tower or adapter is written at the end"))
    return rows


def _progress(status: SimpleNamespace) -> str:
    of = f" of {status.total_steps} ({100 * status.step / status.total_steps:.0f} %)" if status.total_steps else ""
    parts = [f"step {status.step}{of}", f"{status.samples:,} samples"]
    if status.epoch_samples:
        parts.append(f"{status.samples / status.epoch_samples:.2f} epochs")
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4g}")
    if status.seconds_left is not None:
        parts.append(f"{timedelta(seconds=round(status.seconds_left))} left at the last rate")
    if status.last_change:
        parts.append(f"last line {ago(status.last_change)}")
    return ", ".join(parts)


def _cache_rows(status: SimpleNamespace) -> list[tuple[str, str]]:
    done = "complete" if status.complete else "not complete"
    of = f" of {status.shards}" if status.shards else ""
    return [
        (status.folder, f"{done}: {status.done}{of} shards of {status.data or 'its data'}"),
        ("teacher", f"{status.teacher}, {status.width} wide, {status.dtype}" if status.teacher else ""),
        ("captions", f"{status.captions:,}" if status.captions else ""),
        ("last shard", ago(status.last_change)),
    ]


def ago(seconds_since_epoch: float) -> str:
    """``0:00:12 ago``; "" for 0."""
    seconds = round(time.time() - seconds_since_epoch)
    return f"{timedelta(seconds=seconds)} ago" if seconds_since_epoch else ""


def run_status(folder: Path) -> SimpleNamespace:
    """What the folder of a run of either stage shows; what is damaged or missing is in ``problems``, and no error."""
    problems: list[str] = []
    record = _read(RunRecord, folder, problems) or RunRecord(config={}, config_hash="")
    metrics = read_metrics(folder / files.METRICS)
    if metrics.unreadable:
        problems.append(f"{metrics.unreadable} unreadable lines in {files.METRICS}")
    if metrics.save_failed:
        problems.append(f"the last checkpoint could not be written: {metrics.save_failed.get('reason', '')}")
    step, total = max(metrics.step, record.step), record.total_steps
    state, reason = _state(folder, record, metrics, step)
    rate = sum(metrics.seconds) / len(metrics.seconds) if metrics.seconds else None  # seconds of a step
    scored = {at: scores for at, scores in metrics.scores.items() if at}
    by_name = [(name, value, at) for at, scores in scored.items() for name, value in scores.items()]
    last_scored = max(scored, default=0)
    written = [path for name in (files.METRICS, RunRecord.FILE) if (path := folder / name).is_file()]
    go_on = files.again(record.command)
    if not go_on and "tower" in record.config:  # called from Python
        go_on = command("train-tower", "--config", folder / RunRecord.FILE)
    return SimpleNamespace(
        folder=str(folder),
        state=state,  # running | running elsewhere | finished | stopped | failed | killed
        reason=reason,
        step=step,
        total_steps=total,  # 0, as epoch_samples: unknown
        samples=max(metrics.samples, record.samples),
        epoch_samples=record.epoch_samples,
        loss=metrics.loss,
        seconds_left=rate * (total - step) if rate is not None and total > step else None,
        last_change=max((path.stat().st_mtime for path in written), default=0.0),
        before=metrics.scores.get(0) or {name: record.before[name] for name in files.headline(record.before)},
        best={name: (value, at) for name, value, at in sorted(by_name, key=lambda each: (each[1], -each[2]))},
        last=scored.get(last_scored, {}),
        last_scored=last_scored,  # step of ``last``
        checkpoints=sorted(path.name for path in (folder / files.CHECKPOINTS).glob("step-*")),
        results=[name for name, card in RESULTS.items() if (folder / name / card).is_file()],
        go_on="" if state in ("finished", "running", "running elsewhere") else go_on,
        problems=problems,
    )


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
        if event in (files.STOPPED, files.FAILED):
            self.ended = line
        elif event in (files.SAVE_FAILED, files.SAVED):
            self.save_failed = line if event == files.SAVE_FAILED else None
        elif event is None and "loss" in line:
            self.step, self.samples, self.loss, self.ended = step, int(line["samples"]), float(line["loss"]), None
            self.seconds.extend([float(line["step_seconds"])] if "step_seconds" in line else [])
        elif event is None:
            scores = {name: float(value) for name, value in line.items() if name not in ("step", "samples")}
            self.scores[step] = {name: scores[name] for name in files.headline(scores)}


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


def _state(folder: Path, record: RunRecord, metrics: Metrics, step: int) -> tuple[str, str]:
    with suppress(OSError, ValueError, KeyError, TypeError):  # no lock, or a damaged one
        holder = json.loads((folder / files.LOCK).read_text(encoding="utf-8"))
        who = f"process {int(holder['pid'])} on {holder['host']}"
        if holder["host"] != socket.gethostname():
            return "running elsewhere", f"{who}, or killed there"
        if _is_alive(int(holder["pid"]), float(holder["started"])):
            return "running", who
    if record.finished:
        return "finished", ""
    if not step and (folder / files.UNFINISHED_HEADS).is_file():
        return "stopped", f"in the fit of the heads, before step 1; saved in {files.UNFINISHED_HEADS}"
    if metrics.ended:
        when = f", {metrics.ended['time']}" if "time" in metrics.ended else ""
        state = "stopped" if metrics.ended["event"] == files.STOPPED else "failed"
        return state, metrics.ended.get("reason", "") + when
    died = "no message: killed from outside, out of memory, or the machine went down"
    return "killed", died if step else "before step 1"


def _is_alive(pid: int, started: float) -> bool:
    """Whether this host has a process of that number that began then."""
    import psutil  # of accelerate's

    try:
        return abs(psutil.Process(pid).create_time() - started) < 1
    except psutil.Error:
        return False


def cache_status(folder: Path) -> SimpleNamespace:
    """What the folder of a cache shows; what is damaged or missing is in ``problems``, and no error."""
    problems: list[str] = []
    manifest = _read(CacheManifest, folder, problems)
    record = _read(EmbedRecord, folder, problems) if (folder / EmbedRecord.FILE).exists() else None
    listed = list(manifest.shards) if manifest else []
    names = record.shards if record else listed
    there = [file for file in (folder / shard_file(name) for name in {*names, *listed}) if file.is_file()]
    if lost := [name for name in listed if not (folder / shard_file(name)).is_file()]:
        problems.append(f"{len(lost)} shards of the manifest have no file, such as {lost[0]}")
    complete = manifest is not None and manifest.complete and set(names) <= set(listed) and not problems
    return SimpleNamespace(
        folder=str(folder),
        complete=complete,
        done=len(there),  # shards with a file, which appears when it is complete
        shards=len(names),
        data=record.data if record else "",
        captions=manifest.captions if manifest else 0,
        teacher=str(manifest.teacher.get("llm", "")) if manifest else "",
        width=manifest.width if manifest else 0,
        dtype=manifest.dtype if manifest else "",
        last_change=max((file.stat().st_mtime for file in there), default=0.0),
        go_on=files.again(record.command) if record and not complete else "",
        problems=problems,
    )


def _read(kind: type, folder: Path, problems: list[str]):
    try:
        return kind.read(folder / kind.FILE)
    except (files.ContractError, OSError) as error:
        problems.append(str(error))
        return None
