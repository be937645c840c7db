"""``llm2clip status FOLDER``: where a training run or an embedding cache stands. Imports no torch."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from llm2clip_plugin.contracts import CacheManifest
from llm2clip_plugin.options.command import Command
from llm2clip_plugin.outside.values import printable_lines
from llm2clip_plugin.stages.status.cache_folder import CacheStatus, cache_status
from llm2clip_plugin.stages.status.run_folder import RunStatus, ago, is_run, run_status

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
