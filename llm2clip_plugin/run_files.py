"""Names in a run folder and its metrics.jsonl, and how the run was started. Needs the standard library alone."""

import os
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"  # folder
LATEST = "latest"  # name of the newest checkpoint, in that folder
METRICS = "metrics.jsonl"
LOCK = "run.lock"

# events of metrics.jsonl
HEADS = "heads"  # of the fit of the heads on the frozen tower, before step 1
SAVED = "checkpoint"  # a checkpoint is complete
SAVE_FAILED = "checkpoint failed"
LEFT_OUT = "batch left out"  # its loss or gradient was not finite
STOPPED = "stopped"  # by a signal, and saved
FAILED = "failed"  # by an error

# files for the job script that started a run: scripts/slurm/torchrun.sbatch
PROGRESS = "progress"  # a checkpoint, or a shard of embed, is complete
FINAL = "final"  # the exit status of an error that a rerun would meet again

HEADLINE = ("i2t_r1", "t2i_r1")  # of a tower's scores: recall over all captions
LAUNCHERS = ("deepspeed", "torchrun", "accelerate")
LAUNCHER_MODULES = ("torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.runner")


def tell_job(name: str, text: str = "") -> None:
    """Leave a file in the folder that the job script has named, if there is one. Nothing depends on whether it can."""
    if folder := os.environ.get("LLM2CLIP_JOB_DIR"):
        with suppress(OSError):
            Path(folder, name).write_text(text + "\n", encoding="utf-8")


def headline(scores: Iterable[str]) -> list[str]:
    """The names of the scores to show: those of all captions, all names where there are none (stage 1)."""
    names = list(scores)
    return [name for name in names if name in HEADLINE] or names


def started_by(command: str, words: Sequence[str]) -> dict[str, Any]:
    """For run.json: the words of the ``llm2clip`` command, its launcher's command line if it has one, ranks, folder."""
    return {
        "words": [command, *words],
        "launcher": _launcher(),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "folder": os.getcwd(),
    }


def again(command: dict[str, Any]) -> str:
    """The shell command that goes on, from ``started_by``; "" if nothing was recorded.

    ``--resume PATH`` is left out: it would go back again.
    """
    words, folder, ranks = command.get("words"), command.get("folder"), command.get("ranks", 1)
    if not words:
        return ""
    line = shlex.join(_without_resume(command.get("launcher") or ["llm2clip", *words]))
    if folder and folder != os.getcwd():
        line = f"cd {shlex.quote(folder)} && {line}"
    if ranks > 1 and not command.get("launcher"):
        line += f"  # on {ranks} ranks: under the launcher that started it"
    return line


def _without_resume(words: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if not skip and name not in ("--resume", "--resume-from-checkpoint"):
            kept.append(word)
        skip = name in ("--resume", "--resume-from-checkpoint") and "=" not in word
    return kept


def _launcher() -> list[str]:
    """The command line of the launcher above this process; [] without one, or without psutil."""
    if os.environ.get("WORLD_SIZE") is None:
        return []
    try:
        import psutil  # comes with DeepSpeed
    except ModuleNotFoundError:
        return []
    found: list[str] = []
    try:
        for parent in psutil.Process().parents():
            words = parent.cmdline()
            program = next((i for i, word in enumerate(words[:3]) if Path(word).name in LAUNCHERS), None)
            if program is not None:
                found = [Path(words[program]).name, *words[program + 1 :]]
            elif len(words) > 2 and words[1] == "-m" and words[2] in LAUNCHER_MODULES:
                found = ["python", *words[1:]]
    except psutil.Error:  # a parent has ended meanwhile
        pass
    return found  # of the outermost one
