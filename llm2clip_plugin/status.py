"""``llm2clip status``: where a run, one of its trainings or a cache stands, from the files in its
folder alone."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from llm2clip_plugin import run_folder
from llm2clip_plugin.contracts import (
    CacheManifest,
    EmbedRecord,
    EncoderCard,
    PipelineRecord,
    RunRecord,
    TowerCard,
    shard_file,
)
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.metrics import Metrics, read_metrics
from llm2clip_plugin.options import Command, command, setting
from llm2clip_plugin.outside import printable_lines

# folder -> its card
RESULTS = {
    "tower": TowerCard.FILE,
    "tower-ema": TowerCard.FILE,
    "adapter": EncoderCard.FILE,
}
# states without a way to go on
FINISHED = "finished"
RUNNING = "running"
ELSEWHERE = "running on another host"


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """What to show."""

    folder: Path = setting(
        help="output folder of `llm2clip run` or of a training (either stage), or an embedding "
        "cache",
    )


COMMAND = Command(
    name="status",
    example="llm2clip status runs/photos",
    about=(
        "Where a run with all its stages, a training or an embedding cache stands: progress, "
        "scores, checkpoints, the command to resume. It only reads files, so it is safe while the "
        "run is in progress."
    ),
    settings=StatusConfig,
    arguments="folder",
)


# names in a run's folder, any of which shows that it is one
OF_A_RUN = (
    RunRecord.FILE,
    run_folder.METRICS,
    run_folder.LOCK,
    run_folder.CHECKPOINTS,
)


def main(argv: list[str]) -> int:
    """Print the status; exit status 0. Raises FileNotFoundError for a folder that is neither a
    run's nor a cache."""
    folder = COMMAND.parse(argv).folder
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if (folder / CacheManifest.FILE).exists():
        (name, state), *rows = cache_rows(folder)
    elif (folder / PipelineRecord.FILE).exists():
        (name, state), *rows = pipeline_rows(folder)
    elif any((folder / name).exists() for name in OF_A_RUN):
        (name, state), *rows = run_rows(folder)
    else:
        run = "the folder of a run (run.json, checkpoints/)"
        cache = f"an embedding cache ({CacheManifest.FILE})"
        advice = "pass the --output of `llm2clip run` or of a training, or an embeddings-* folder"
        raise FileNotFoundError(f"{folder} is neither {run} nor {cache}; {advice}")
    width = max(len(name) for name, _ in rows)
    lines = [
        f"{name}: {state}",
        *(f"  {name:<{width}}  {text}" for name, text in rows if text),
    ]
    print(printable_lines("\n".join(lines)))
    return 0


def pipeline_rows(folder: Path) -> Iterator[tuple[str, str]]:
    """As ``run_rows``, of the folder of ``llm2clip run``: a row for each stage, and the progress of
    the one that is not complete. Whether inputs have changed since, `llm2clip run --dry-run` says:
    it reads them."""
    problems: list[str] = []
    record = _read(PipelineRecord, folder, problems) or PipelineRecord()
    done = [
        name for name in record.order if record.stages.get(name, {}).get("complete")
    ]
    holder = lock_holder(folder)
    is_finished = bool(record.order) and len(done) == len(record.order)
    if holder:
        process_state, process = holder
        state = f"{process_state} ({process})"
    else:
        state = FINISHED if is_finished else "stopped"
    yield str(folder), f"{state}: {len(done)} of {len(record.order)} stages complete"
    for name in record.order:
        saved = record.stages.get(name)
        if name in done:
            yield name, f"complete, {record.stages[name]['seconds']:.0f} s"
        elif saved is None:
            yield name, "to do"
        else:
            yield name, "running" if holder else "not complete"
            if saved["output"]:
                yield from inner_rows(folder / saved["output"])
    page = folder / "index.html"
    if is_finished and page.is_file():
        yield "page", str(page)
    yield from (("problem", problem) for problem in problems)
    if not is_finished and holder is None:
        yield "go on", run_folder.again(record.command)


def inner_rows(folder: Path) -> Iterator[tuple[str, str]]:
    """What a stage that is not complete has done so far, if it leaves that in its folder."""
    if (folder / CacheManifest.FILE).exists():
        yield "progress", next(cache_rows(folder))[1]
    elif (folder / RunRecord.FILE).exists() or (folder / run_folder.METRICS).exists():
        yield from (row for row in run_rows(folder) if row[0] == "progress")


def run_rows(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of what the folder of a run of either stage shows, its state first; the rows
    "problem" tell what is damaged or missing."""
    problems: list[str] = []
    record = _read(RunRecord, folder, problems) or RunRecord(config={}, config_hash="")
    metrics = read_metrics(folder / run_folder.METRICS)
    step = max(metrics.step, record.step)
    total = record.total_steps
    samples = max(metrics.samples, record.samples)
    state, reason = run_state(folder, record, metrics, step)
    yield str(folder), state + (f": {reason}" if reason else "")
    progress = f"step {step}"
    if total:
        progress += f" of {total} ({100 * step / total:.0f} %)"
    parts = [progress, f"{samples:,} samples"]
    if record.epoch_samples:
        parts.append(f"{samples / record.epoch_samples:.2f} epochs")
    if metrics.loss is not None:
        parts.append(f"loss {metrics.loss:.4g}")
    if metrics.seconds and total > step:
        seconds_a_step = sum(metrics.seconds) / len(metrics.seconds)
        left = timedelta(seconds=round(seconds_a_step * (total - step)))
        parts.append(f"{left} left at the last rate")
    if metrics.step:
        parts.append(f"last line {ago((folder / run_folder.METRICS).stat().st_mtime)}")
    yield "progress", ", ".join(parts)
    yield "loader", metrics.loader()
    yield from score_rows(record, metrics)
    saved = sorted(
        path.name for path in (folder / run_folder.CHECKPOINTS).glob("step-*")
    )
    yield "checkpoints", ", ".join(saved) or "none yet"
    results: list[str] = []
    for name, card in RESULTS.items():
        if (folder / name / card).is_file():
            results.append(str(folder / name))
    yield (
        "result",
        ", ".join(results) or "none yet: the tower or adapter is written at the end",
    )
    if metrics.unreadable:
        problems.append(
            f"{metrics.unreadable} unreadable lines in {run_folder.METRICS}"
        )
    if metrics.save_failed:
        problems.append(
            f"the last checkpoint could not be written: {metrics.save_failed.get('reason', '')}"
        )
    yield from (("problem", problem) for problem in problems)
    if state not in (FINISHED, RUNNING, ELSEWHERE):
        resume = run_folder.again(record.command)
        if not resume and "tower" in record.config:  # started from Python
            resume = command("train-tower", "--config", folder / RunRecord.FILE)
        yield "go on", resume


def score_rows(record: RunRecord, metrics: Metrics) -> Iterator[tuple[str, str]]:
    """Each score before training, at its best and at last."""
    scores = dict(sorted(metrics.scores.items()))  # step -> its scores
    before = scores.pop(0, {})
    if not before:
        before = {
            name: record.before[name] for name in run_folder.headline(record.before)
        }
    newest = next(reversed(scores.values()), before)
    for name in newest:
        parts: list[str] = []
        if name in before:
            parts.append(f"before {before[name]:.3f}")
        # of equal values the earliest step is the best
        values = [
            (of_step[name], -step)
            for step, of_step in scores.items()
            if name in of_step
        ]
        if values:
            best, best_step = max(values)
            last, last_step = values[-1]
            parts.append(f"best {best:.3f} (step {-best_step})")
            parts.append(f"last {last:.3f} (step {-last_step})")
        yield name, ", ".join(parts)


def ago(seconds_since_epoch: float) -> str:
    """``0:00:12 ago``."""
    return f"{timedelta(seconds=round(time.time() - seconds_since_epoch))} ago"


def run_state(
    folder: Path, record: RunRecord, metrics: Metrics, step: int
) -> tuple[str, str]:
    """Finished, running, running on another host, stopped, failed or ended early; and why."""
    if (holder := lock_holder(folder)) is not None:
        return holder
    if record.finished:
        return FINISHED, ""
    if not step and (folder / run_folder.UNFINISHED_HEADS).is_file():
        return (
            "stopped",
            f"in the fit of the heads, before step 1; saved in {run_folder.UNFINISHED_HEADS}",
        )
    if metrics.ended:
        when = f", {metrics.ended['time']}" if "time" in metrics.ended else ""
        state = "stopped" if metrics.ended["event"] == run_folder.STOPPED else "failed"
        return state, metrics.ended.get("reason", "") + when
    died = "no message: killed from outside, out of memory, or the machine went down"
    return "ended early", died if step else "before step 1"


def lock_holder(folder: Path) -> tuple[str, str] | None:
    """Running, here or on another host, and the process; None if nobody holds the lock."""
    with suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # no lock, or a damaged one
        holder = json.loads((folder / run_folder.LOCK).read_text(encoding="utf-8"))
        who = f"process {int(holder['pid'])} on {holder['host']}"
        if holder["host"] != socket.gethostname():
            return ELSEWHERE, f"{who}, or killed there"
        if _is_alive(int(holder["pid"]), float(holder["started"])):
            return RUNNING, who
    return None


def _is_alive(pid: int, started: float) -> bool:
    """Whether this host has a process of that number that began then."""
    import psutil  # of accelerate's

    try:
        return abs(psutil.Process(pid).create_time() - started) < 1
    except psutil.Error:
        return False


def cache_rows(folder: Path) -> Iterator[tuple[str, str]]:
    """As ``run_rows``, of the folder of a cache."""
    problems: list[str] = []
    manifest = _read(CacheManifest, folder, problems)
    record = None
    if (folder / EmbedRecord.FILE).exists():
        record = _read(EmbedRecord, folder, problems)
    listed = list(manifest.shards) if manifest else []
    names = record.shards if record else listed
    paths = {name: folder / shard_file(name) for name in (*names, *listed)}
    there = [path for path in paths.values() if path.is_file()]
    if lost := [name for name in listed if not paths[name].is_file()]:
        problems.append(
            f"{len(lost)} shards of the manifest have no file, such as {lost[0]}"
        )
    has_all = set(names) <= set(listed) and not problems
    complete = manifest is not None and manifest.complete and has_all
    done = f"{len(there)} of {len(names)} shards of {record.data if record else 'its data'}"
    yield str(folder), f"{'complete' if complete else 'not complete'}: {done}"
    if manifest:
        llm = manifest.teacher.get("llm", "")
        yield "teacher", f"{llm}, {manifest.width} wide, {manifest.dtype}"
        yield "captions", f"{manifest.captions:,}"
    yield (
        "last shard",
        ago(max(file.stat().st_mtime for file in there)) if there else "",
    )
    yield from (("problem", problem) for problem in problems)
    yield "go on", run_folder.again(record.command) if record and not complete else ""


def _read(kind: type, folder: Path, problems: list[str]):
    try:
        return kind.read(folder / kind.FILE)
    except (ContractError, OSError) as error:
        problems.append(str(error))
        return None
