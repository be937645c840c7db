"""Which stages of ``llm2clip run`` are complete, which run again, and why.

A stage is complete if its command, the digests of all that it reads and of all that it made are
those that were recorded. One whose input changed starts anew: its old output is removed first. One
that was killed goes on.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import PipelineRecord
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.json_files import read_json_value
from llm2clip_plugin.processes import on_ranks
from llm2clip_plugin.stages.digests import Artifact, Digests

EARLIER = "its record is of an earlier release, without digests"
OLD = ".replaced-"  # prefix of old outputs that are being removed


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command of a run."""

    name: str
    words: tuple[str, ...]  # llm2clip ..., or a shell script and its arguments
    reads: tuple[Artifact, ...] = ()
    makes: tuple[Artifact, ...] = ()
    # file or folder that the stage writes, all of it; None: it writes nothing
    output: Path | None = None
    ranks: int = 1  # processes
    # whether the same command goes on from an output that is not complete
    resumes: bool = False
    # name of what it reads whose change needs no new start: the output is brought up to date, after
    # ``update``, with ``update_words`` added to the command
    updates: str = ""
    update: Callable[[], object] = lambda: None
    update_words: tuple[str, ...] = ()
    # settings with paths, which may differ from a checkpoint's in a moved folder
    moved_fields: tuple[str, ...] = ()
    # options whose values follow this machine, and so are no reason to run again
    by_machine: tuple[str, ...] = ()

    @property
    def command_length(self) -> int:
        """How many words name the program and its command."""
        if self.words[0] != "llm2clip":
            return 0  # a script, which may be at another place
        return 3 if self.words[1] in ("data", "llava") else 2

    def argv(self, more: Sequence[str] = ()) -> list[str]:
        """The program and its words, by this Python."""
        if self.words[0] != "llm2clip":
            return ["bash", *self.words, *more]
        return on_ranks(self.ranks, "llm2clip_plugin.cli", *self.words[1:], *more)


class RunFolder:
    """The folder of a run: the record of its stages, and the digests of files."""

    def __init__(self, out: Path, places: Mapping[str, str]) -> None:
        """places: path -> what it is, of the folders and files that may be moved: contents are
        compared instead."""
        self.out = out
        self.digests = Digests(out)
        self._places = sorted(places.items(), key=lambda item: -len(item[0]))
        self.is_ours, self.record = _read_record(out / PipelineRecord.FILE)

    def refuse_foreign(self, stages: Sequence[Stage]) -> None:
        """Raise FileExistsError for an output that no earlier run recorded."""
        for stage in stages:
            if not self.is_ours and stage.output is not None and stage.output.exists():
                raise FileExistsError(
                    f"{stage.output} exists, but was not made by `llm2clip run` "
                    f"({self.out} has no pipeline.json); choose another --output, or delete it"
                )

    def stale(self, stages: Sequence[Stage]) -> dict[str, str]:
        """Name of each stage that is to run -> why it runs again, "" if a stage before it says so,
        or it is new."""
        todo: dict[str, str] = {}
        made_again: set[str] = set()
        for stage in stages:
            why = self.why(stage, made_again)
            if why is not None:
                todo[stage.name] = why
                made_again |= {artifact.name for artifact in stage.makes}
        return todo

    def why(self, stage: Stage, made_again: Collection[str] = ()) -> str | None:
        """Why a stage runs; None if it is complete. ``made_again``: names of artifacts that are not
        final yet."""
        saved = self.record.stages.get(stage.name)
        if saved is None:
            return EARLIER if self.is_ours and not self.record.stages else ""
        waits = any(artifact.name in made_again for artifact in stage.reads)
        for artifact in stage.reads:
            if artifact.name not in made_again and (
                change := self._change(saved["reads"], artifact)
            ):
                return f"{change} since it {'was made' if stage.makes else 'last ran'}"
        if change := changed_words(saved["key"], self._key(stage)):
            return change
        if waits or not saved["complete"]:
            return ""
        for artifact in stage.makes:
            if change := self._change(saved["makes"], artifact):
                return f"its result {change}"
        return None

    def begin(
        self, stage: Stage, order: Sequence[str], command: dict[str, Any]
    ) -> list[str]:
        """Make room for a stage's output and record that it has started; returns words to add to
        its command."""
        reads = {artifact.name: self.digests.of(artifact) for artifact in stage.reads}
        saved = self.record.stages.get(stage.name)
        more: list[str] = []
        updating = False
        if saved is None or not stage.resumes or not self._goes_on(stage, saved, reads):
            self._set_aside(stage.output)
        else:
            updating = saved["updating"] or saved["reads"] != reads
            if updating:
                stage.update()
                more += stage.update_words
            # a checkpoint may have been written before the folder was moved, however often the
            # stage has started since; the run itself compares contents
            if stage.moved_fields:
                more += ["--allow-changed", *stage.moved_fields]
        entry = {
            "words": list(stage.words),
            "key": self._key(stage),
            "reads": reads,
            "makes": {},
            "complete": False,
            "updating": updating,
            "seconds": 0.0,
            "output": os.path.relpath(stage.output, self.out) if stage.output else "",
        }
        self._write(stage, entry, order, command)
        return more

    def end(self, stage: Stage, seconds: float) -> None:
        """Record that a stage is complete."""
        makes = {artifact.name: self.digests.of(artifact) for artifact in stage.makes}
        entry = {
            **self.record.stages[stage.name],
            "makes": makes,
            "complete": True,
            "seconds": round(seconds, 1),
        }
        self._write(stage, entry, self.record.order, self.record.command)

    def clean(self) -> None:
        """Remove what a killed run left of old outputs, and read the record again, now that no
        other run writes it."""
        self.is_ours, self.record = _read_record(self.out / PipelineRecord.FILE)
        for path in self.out.glob(f"{OLD}*"):
            _remove(path)

    def _write(
        self,
        stage: Stage,
        entry: dict[str, Any],
        order: Sequence[str],
        command: dict[str, Any],
    ) -> None:
        stages = {**self.record.stages, stage.name: entry}
        self.record = replace(
            self.record, stages=stages, order=list(order), command=command
        )
        self.record.write(self.out / PipelineRecord.FILE)
        self.is_ours = True
        self.digests.save()

    def _goes_on(
        self, stage: Stage, saved: dict[str, Any], reads: dict[str, Any]
    ) -> bool:
        """Whether the output that is there was made by the same command from the same input."""
        differing = {name for name in reads if reads[name] != saved["reads"].get(name)}
        return saved["key"] == self._key(stage) and differing <= {stage.updates}

    def _change(self, saved: dict[str, Any], artifact: Artifact) -> str:
        """How an artifact differs from the one recorded; "" if it does not."""
        was = saved.get(artifact.name)
        now = self.digests.of(artifact)
        if was is not None and was["sha256"] == now["sha256"]:
            return ""
        paths = artifact.files()
        if was is None or was["files"] is None or now["files"] is None:
            return f"{artifact.name} changed"
        changes = [
            f"{paths[name]} is new" for name in now["files"] if name not in was["files"]
        ]
        for name in was["files"]:
            if name not in now["files"]:
                of_artifact = "" if name == artifact.name else f" of {artifact.name}"
                changes.append(f"{name}{of_artifact} is gone")
        for name, digest in now["files"].items():
            if name in was["files"] and was["files"][name] != digest:
                changes.append(f"{paths[name]} changed")
        last = changes[-1]
        others = len(changes) - 1
        if others:
            return f"{last} (and {others} more)"
        return last

    def _key(self, stage: Stage) -> list[str]:
        """The words with what they name in place of paths that may be moved, without the options
        that follow the machine."""
        key = list(stage.words[: stage.command_length])
        words = iter(stage.words[stage.command_length :])
        for word in words:
            if word in stage.by_machine:
                next(words)  # its value
            else:
                key.append(self._placeless(word))
        return key

    def _placeless(self, word: str) -> str:
        prefix = "llm2clip:" if word.startswith("llm2clip:") else ""
        rest = word.removeprefix(prefix)
        for path, what in self._places:
            if rest == path or rest.startswith(path.rstrip("/") + "/"):
                return prefix + what + rest[len(path.rstrip("/")) :]
        return word

    def _set_aside(self, output: Path | None) -> None:
        """Remove an output at once: it is never there in part."""
        if output is None or not (output.exists() or output.is_symlink()):
            return
        old = self.out / f"{OLD}{uuid.uuid4().hex[:8]}"
        os.replace(output, old)
        _remove(old)


def changed_words(before: Sequence[str], now: Sequence[str]) -> str:
    """How a command differs from the one recorded: its first option that does; "" if none does."""
    if list(before) == list(now):
        return ""
    old = options_of(before)
    new = options_of(now)
    for option in [*new, *(name for name in old if name not in new)]:
        was = " ".join(old.get(option, ()))
        value = " ".join(new.get(option, ()))
        if option not in old:
            return f"{option} {value}".rstrip() + " is new"
        if option not in new:
            return f"{option} {was}".rstrip() + " is gone"
        if value != was and option:
            return f"{option} is {value}, was {was}"
        for was_word, word in zip(old[option], new[option], strict=False):
            if was_word != word:
                return f"its command is {word}, was {was_word}"
        if value != was:
            return f"its command is {value}, was {was}"
    return "the order of its options changed"


def options_of(words: Sequence[str]) -> dict[str, list[str]]:
    """Option -> its values; "": the words before the first option."""
    values: dict[str, list[str]] = {"": []}
    option = ""
    for word in words:
        if word.startswith("--"):
            option = word
            values.setdefault(option, [])
        else:
            values[option].append(word)
    return values


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
        return
    with suppress(FileNotFoundError):
        path.unlink()


def _read_record(path: Path) -> tuple[bool, PipelineRecord]:
    """Whether a run has written the record, and the record; that of an earlier release says nothing
    about digests."""
    if not path.is_file():
        return False, PipelineRecord()
    body = read_json_value(path)
    if isinstance(body, dict) and "kind" not in body:
        return True, PipelineRecord()
    try:
        return True, PipelineRecord.read(path)
    except ContractError as error:
        raise ContractError(f"{error}; delete it to run all stages again") from error
