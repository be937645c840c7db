"""Answers on their way into a file: written as they come, over ranks, and put together when all are there.

While a run goes on, ``ANSWERS.partial/`` holds its settings and a file a process. A killed run continues from them,
also with another number of ranks; no rank waits for another.
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import ContractError, whole_file


class AnswerBook:
    """The answers of one run, by place in the question file."""

    def __init__(self, path: Path, settings: dict[str, Any], total: int, *, overwrite: bool = False):
        """``settings``: all that decides the answers; kept beside the file as ``ANSWERS.settings.json``.

        Raises ContractError if answers made with other settings are there, unless ``overwrite``.
        """
        self.path, self.settings, self.total = path, settings, total
        self.partial = path.with_name(path.name + ".partial")
        self.settings_file = path.with_name(path.name + ".settings.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            path.unlink(missing_ok=True)
            self.settings_file.unlink(missing_ok=True)
            shutil.rmtree(self.partial, ignore_errors=True)
        self.compare_settings()
        self.partial_file = self.partial / f"{uuid.uuid4().hex[:12]}.jsonl"

    def compare_settings(self) -> None:
        """Write the settings, or hold this run to those that its predecessor wrote."""
        if self.settings_file.is_file():
            before = json.loads(self.settings_file.read_text(encoding="utf-8"))
            names = sorted(name for name in {*before, *self.settings} if before.get(name) != self.settings.get(name))
            if names:
                differ = ", ".join(f"{name} {before.get(name)!r} -> {self.settings.get(name)!r}" for name in names)
                raise ContractError(
                    f"{self.path} was begun with other settings ({differ}); write to another file or pass --overwrite"
                )
        elif self.path.exists() or self.partial.exists():
            raise ContractError(f"{self.path} was written by another program; choose another path or pass --overwrite")
        else:
            with whole_file(self.settings_file) as aside:
                aside.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")

    @property
    def complete(self) -> bool:
        """Whether the answers are put together."""
        return self.path.is_file()

    def done(self) -> dict[int, dict[str, Any]]:
        """The answers so far, over all ranks and earlier runs; a line torn by a kill does not count."""
        found: dict[int, dict[str, Any]] = {}
        for file in sorted(self.partial.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").split("\n"):
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                found[entry["index"]] = entry["answer"]
        return found

    def write(self, answers: dict[int, dict[str, Any]]) -> None:
        """Add answers to this process's file, at once on disk."""
        self.partial.mkdir(exist_ok=True)
        with self.partial_file.open("a", encoding="utf-8") as file:
            for index, answer in answers.items():
                file.write(json.dumps({"index": index, "answer": answer}, ensure_ascii=False) + "\n")

    def finish(self) -> int:
        """Put the answers together in order of the questions if all are there; returns how many are missing."""
        try:
            found = self.done()
        except FileNotFoundError:  # another rank has just put them together and cleared up
            found = {}
        if self.complete:
            return 0
        if len(found) < self.total:
            return self.total - len(found)
        with whole_file(self.path) as aside:
            aside.write_text("".join(json.dumps(found[i]) + "\n" for i in range(self.total)), encoding="utf-8")
        shutil.rmtree(self.partial, ignore_errors=True)
        return 0
