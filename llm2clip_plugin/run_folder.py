"""What a training run leaves in its folder: names of its files, events of metrics.jsonl, and the
command that goes on. Standard library only.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"  # folder
LATEST = "latest"  # name of the newest checkpoint, in that folder
METRICS = "metrics.jsonl"
LOCK = "run.lock"
UNFINISHED_HEADS = "heads.pt"  # state of a fit of the heads that was stopped

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
OF_BENCHMARK = (*HEADLINE, "mean", "acc1")  # of a benchmark NAME: NAME/mean ...


def tell_job(name: str, text: str = "") -> None:
    """Leave a file in the folder that the job script has named, if there is one. Nothing depends on
    whether it can."""
    if folder := os.environ.get("LLM2CLIP_JOB_DIR"):
        with suppress(OSError):
            Path(folder, name).write_text(text + "\n", encoding="utf-8")


def headline(scores: Iterable[str]) -> list[str]:
    """The names of the scores to show: of all captions, and of benchmarks; all where there are none
    (stage 1)."""
    names = list(scores)
    headlines: list[str] = []
    for name in names:
        score = name.rpartition("/")[2]
        of_benchmark = ":" not in name and score in OF_BENCHMARK
        if name in HEADLINE or of_benchmark:
            headlines.append(name)
    return headlines or names


def started_by(command: str, words: Sequence[str]) -> dict[str, Any]:
    """For run.json: the words of the ``llm2clip`` command, its ranks and folder."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return {"words": [command, *words], "ranks": ranks, "folder": os.getcwd()}


def again(command: dict[str, Any]) -> str:
    """The shell command that goes on, from ``started_by``, without ``--resume PATH``; "" if nothing
    was recorded."""
    words = command.get("words")
    folder = command.get("folder")
    ranks = command.get("ranks", 1)
    if not words:
        return ""
    line = shlex.join(["llm2clip", *words])
    line = re.sub(r" --resume([-_]from[-_]checkpoint)?[ =]('[^']*'|\S)+", "", line)
    if folder and folder != os.getcwd():
        line = f"cd {shlex.quote(folder)} && {line}"
    if ranks > 1:
        line += f"  # on {ranks} ranks: under the launcher that started it"
    return line
