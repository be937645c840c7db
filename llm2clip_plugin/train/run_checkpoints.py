"""The checkpoints of a run folder: which one to resume from, which to keep.

    checkpoints/
      step-00000110/, step-00000120/    see checkpoint.py
      latest                            name of the newest one, for people and scripts
      abandoned-20261126-101500/        checkpoints and metrics.jsonl of steps that a run went back before

All of ``step-*`` belong to one sequence of steps: what a run does not continue from is moved to ``abandoned-*``, and
never removed.
"""

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llm2clip_plugin.contracts import ContractError, atomic_file
from llm2clip_plugin.run_files import CHECKPOINTS, LATEST, METRICS, PROGRESS, tell_job
from llm2clip_plugin.train.checkpoint import TrainState, verify, write_checkpoint

RESUME_AUTO, RESUME_NEVER = "auto", "never"


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_folder: Path, *, keep: int) -> None:
        """keep: number of checkpoints to keep, 0 for all."""
        self.run_folder = run_folder
        self.folder = run_folder / CHECKPOINTS
        self.keep = keep

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def names(self) -> list[str]:
        """Names of the complete checkpoints, oldest first."""
        return sorted(path.parent.name for path in self.folder.glob(f"step-*/{TrainState.FILE}"))

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None if there is none; its content is not verified."""
        names = self.names()
        return self.folder / names[-1] if names else None

    def write(self, state: TrainState, tensors: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
        """Write a checkpoint of tensors by file, then remove old ones; returns warnings. Raises OSError."""
        target = self.path(state.step)
        write_checkpoint(target, state, tensors)
        self._point_to(target.name)
        tell_job(PROGRESS)
        return self._prune(target)

    def record_metrics(self, state: TrainState) -> None:
        """Put an evaluation into the checkpoint of its step, if there is one. Raises OSError."""
        path = self.path(state.step) / TrainState.FILE
        if path.is_file():
            saved = TrainState.read(path)
            dataclasses.replace(saved, metrics=state.metrics, evaluated=state.evaluated).write(path)

    def _point_to(self, name: str) -> None:
        with atomic_file(self.folder / LATEST) as temporary:
            temporary.write_text(name + "\n", encoding="utf-8")

    def _prune(self, newest: Path) -> list[str]:
        """Remove all but the newest ``keep`` checkpoints, and what a killed run left; returns what failed.

        A checkpoint is renamed first: half removed, it could be taken for a complete one. What fails is tried again
        after the next save.
        """
        older = [path for path in sorted(self.folder.glob("step-*")) if path.name < newest.name]
        old = older[: max(0, len(older) + 1 - self.keep)] if self.keep else []
        warnings = []
        for path in [*old, *self.folder.glob(".*.tmp"), *self.folder.glob(".*.old")]:
            try:
                if not path.name.startswith("."):
                    path = path.rename(path.with_name(f".{path.name}.{time.time_ns():x}.old"))
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            except OSError as error:
                warnings.append(f"cannot remove {path}: {error}; trying again after the next save")
        return warnings

    def find(self, resume: str, *, moments: bool = True, option: str = "--resume") -> Path | None:
        """The checkpoint for a value of ``--resume``: auto (newest of this run, if any), never (None), or a path.

        It is verified; ``auto``, and the path of a run, fall back to an older one with a warning on stderr. Raises
        FileNotFoundError for a path without a checkpoint, which is the value of ``option``, ContractError if all are
        damaged or the named one is, FileExistsError for ``never`` if any exist.
        """
        if resume == RESUME_AUTO:
            return self._newest_intact(moments)
        if resume == RESUME_NEVER:
            if self.names():
                raise FileExistsError(
                    f"{self.folder} contains {self.names()}; refusing to overwrite with --resume never: choose another "
                    "--output, or delete the folder"
                )
            return None
        path = Path(resume)
        if not (path / TrainState.FILE).is_file():
            path = Checkpoints(path, keep=0)._newest_intact(moments)
            if path is None:
                raise FileNotFoundError(
                    f"{option} {resume}: no checkpoint found (no {TrainState.FILE}); this run has {self.names()}"
                )
            return path
        verify(path, moments=moments)
        return path

    def _newest_intact(self, moments: bool) -> Path | None:
        """The newest checkpoint that is verified, with a warning if a newer one is damaged; None if there is none."""
        damaged = []
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                verify(path, moments=moments)
            except (ContractError, OSError) as error:
                damaged.append(str(error))
                continue
            if damaged:
                print(f"warning: {'; '.join(damaged)}\nwarning: falling back to {path}", file=sys.stderr)
            return path
        if damaged:
            raise ContractError(
                f"no checkpoint in {self.folder} is intact: {'; '.join(damaged)}. Restore one, or start over with "
                "another --output"
            )
        return None

    def move_aside(self, resumed: Path | None) -> str:
        """Move what a run does not continue from to ``abandoned-*``: checkpoints newer than ``resumed``, all if that
        is in another folder; returns a line about it, "" if there are none. Raises OSError."""
        names = sorted(path.name for path in self.folder.glob("step-*"))
        own = resumed is not None and resumed.resolve().parent == self.folder.resolve()
        if resumed is not None and own:
            names = [name for name in names if name > resumed.name]
        if not names:
            return ""
        aside = self.folder / f"abandoned-{time.strftime('%Y%m%d-%H%M%S')}"
        while aside.exists():
            aside = aside.with_name(f"{aside.name}x")
        aside.mkdir()
        for name in names:
            os.replace(self.folder / name, aside / name)
        if (self.run_folder / METRICS).is_file():
            shutil.copy2(self.run_folder / METRICS, aside)
        if resumed is not None and own:
            self._point_to(resumed.name)
        return f"moved {', '.join(names)} to {aside}; delete that folder when you no longer need it"
