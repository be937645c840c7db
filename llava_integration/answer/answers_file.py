"""An answers file that several ranks write and a killed run resumes.

Until all answers exist, ``ANSWERS.partial/`` contains a file per process; the rank that finds them complete merges
them. A run resumes with any number of ranks, and no rank waits for another.
"""

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

from llava_integration.answer.questions import Question
from llm2clip_plugin.contracts import ContractError, atomic_file, naming_full_disk
from llm2clip_plugin.outside.values import read_json_value

OTHER_FILE = "choose another --answers-file or pass --overwrite"
IGNORED_ON_RESUME = ("endpoint",)  # a server that is started again has another port; each answer names its own


def entry(question: Question, text: str, model: str, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """A line of LLaVA's answers file."""
    return {
        "question_id": question.id,
        "prompt": question.shown,
        "text": text,
        **question.extra,
        "answer_id": uuid.uuid4().hex[:22],
        "model_id": model,
        "metadata": metadata or {},
    }


def settings_file(answers: Path) -> Path:
    """Where an answers file's settings are: the model and what its answers depend on."""
    return answers.with_name(answers.name + ".settings.json")


class AnswersFile:
    """The answers of one run, by index in the question file."""

    def __init__(self, path: Path, settings: dict[str, Any], total: int, *, overwrite: bool = False):
        """``settings``: every setting that an answer depends on, saved as ``ANSWERS.settings.json``.

        Raises ContractError if answers with other settings exist, unless ``overwrite``; ValueError for a folder.
        """
        self.path, self.settings, self.total = path, settings, total
        self.partial = path.with_name(path.name + ".partial")
        self.settings_file = settings_file(path)
        if path.is_dir():
            raise ValueError(f"--answers-file {path} is a folder; choose a file to write")
        path.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            path.unlink(missing_ok=True)
            self.settings_file.unlink(missing_ok=True)
            shutil.rmtree(self.partial, ignore_errors=True)
        if self.settings_file.is_file():
            self.compare_settings()
        elif path.exists() or self.partial.exists():
            raise ContractError(f"{path} was written by another program; {OTHER_FILE}")
        else:
            with atomic_file(self.settings_file) as temporary:
                temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        self.partial_file = self.partial / f"{uuid.uuid4().hex[:12]}.jsonl"

    def compare_settings(self) -> None:
        """Raise ContractError if a previous run saved other settings."""
        before = read_json_value(self.settings_file)
        compared = {*before, *self.settings} - {*IGNORED_ON_RESUME}
        names = sorted(name for name in compared if before.get(name) != self.settings.get(name))
        if names:
            differ = ", ".join(f"{name} {before.get(name)!r} -> {self.settings.get(name)!r}" for name in names)
            raise ContractError(f"{self.path} was started with other settings ({differ}); {OTHER_FILE}")

    @property
    def complete(self) -> bool:
        """Whether the answers file is written."""
        return self.path.is_file()

    def done(self) -> dict[int, dict[str, Any]]:
        """The answers of all ranks and earlier runs; a line cut short by a kill is ignored."""
        answers: dict[int, dict[str, Any]] = {}
        for file in sorted(self.partial.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    entry = json.loads(line)
                    answers[entry["index"]] = entry["answer"]
                except (ValueError, KeyError, TypeError):
                    continue
        return answers

    def write(self, answers: dict[int, dict[str, Any]]) -> None:
        """Append answers to this process's file; raises DiskFullError, and what was written before is resumed."""
        self.partial.mkdir(exist_ok=True)
        with naming_full_disk(self.path), self.partial_file.open("a", encoding="utf-8") as file:
            for index, answer in answers.items():
                file.write(json.dumps({"index": index, "answer": answer}, ensure_ascii=False) + "\n")

    def finish(self) -> int:
        """Write the answers file, in the order of the questions, if none is missing; returns how many are."""
        try:
            answers = self.done()
        except FileNotFoundError:  # another rank has merged and deleted them
            answers = {}
        if self.complete:
            return 0
        if len(answers) < self.total:
            return self.total - len(answers)
        text = "".join(json.dumps(answers[i]) + "\n" for i in range(self.total))
        with atomic_file(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        shutil.rmtree(self.partial, ignore_errors=True)
        return 0
