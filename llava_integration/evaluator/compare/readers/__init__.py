"""Logs of other evaluators, one file a format; each defines ``READER``, and a new file is a new
format.

A reader makes score files of logs, with an item for each question: ``id``, ``score`` (higher is
better), ``cluster`` (what is resampled together: the questions of one image), ``category`` and
``truth`` where the log has them, and what a composite's rule reads (``benchmarks/rules/``).
Standard library only; what a format needs more is imported in its file.
"""

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_integration.evaluator.benchmarks.rules.mme import COGNITION, PERCEPTION
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.discovery import discover
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.hashes import sha256_text

# a question's image or video; a table may have the picture itself in the last one
IMAGES = (
    "image_id",
    "imageId",
    "img_id",
    "image_name",
    "image_path",
    "img_path",
    "videoID",
    "video_id",
    "video_name",
    "video",
    "image",
)
BY_PART = "mean of categories"  # an aggregate: categories have equal weight
# aggregates of items with the ``loglikelihood`` of a text and its ``length``
PERPLEXITY = "perplexity"
BITS = "bits per byte"
# aggregates of items with a ``label``, the truth, and a ``parsed`` one, the answer
LABELS_F1 = "F1 of labels"
LABELS_MCC = "MCC of labels"
OWN = "score files"  # name of the reader of ours, which take precedence
# characters of a question or an answer: a million of them lie in memory
LONGEST_TEXT = 600


@dataclass(frozen=True, kw_only=True)
class Log(ScoreFile):
    """The scores of one task, scorer or run, and how its number is made of them."""

    # MME | CIDEr | BY_PART | name of a rule | "": the headline of the benchmark's, else the mean
    aggregate: str = ""
    # the number that the evaluator printed; a comparison says where its own differs
    printed: float | None = None
    # how many documents the log has, and how many the printed number is of; None: unknown
    documents: tuple[int, int] | None = None
    # of the group whose tasks have one number: name, metric, printed number, aggregate, run
    group: tuple[Any, ...] = ()
    # whether the log says which task it is of; else its file's name stands for it
    named: bool = True
    # that it was read from; those of a group's tasks
    files: tuple[Path, ...] = ()
    # the run's name or number (seed), where a log says it; "": its file's may
    run: str = ""
    # why a log has no items: nobody knows how its number is made; other logs are compared
    unknown: str = ""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is read of a log that has several of it; "": what the reader takes by itself."""

    group: str = ""  # field whose values tell which items go together
    metric: str = ""  # metric, or column of the score
    filter: str = ""  # of the harness: how answers are extracted
    scorer: str = ""  # of inspect_ai

    def names(self) -> list[str]:
        """Those that are made."""
        return [name for name, value in vars(self).items() if value]


NO_CHOICES = Choices()


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One form of logs."""

    name: str  # as in messages: "lmms-eval"
    endings: tuple[str, ...]  # of its files, in small letters
    # whether a file with such an ending is a log of this form; reads only its start
    fits: Callable[[Path], bool]
    # one for each task, scorer or run in the file; any error names the file. With Choices as its
    # second argument if there are ``choices``.
    read: Callable[..., Iterable[Log]]
    choices: tuple[str, ...] = ()  # the fields of Choices that it takes
    # whether a file that does not fit does with the chosen metric; None: no metric changes that
    fits_metric: Callable[[Path, str], bool] | None = None

    def takes(self, file: Path, choices: Choices) -> bool:
        """Whether a file is a log of this form."""
        if not file.name.lower().endswith(self.endings) or not file.is_file():
            return False
        if self.fits(file):
            return True
        if self.fits_metric is None or not choices.metric:
            return False
        return self.fits_metric(file, choices.metric)


def readers() -> dict[str, Reader]:
    """Every reader by name."""
    return discover(__name__, "READER")


def read_logs(path: Path, choices: Choices = NO_CHOICES) -> list[tuple[Path, Log]]:
    """The scores in a log, or in all logs below a folder; none if there is no log. The tasks of a
    group (BLINK's 14, MMLU's 57) become one. Raises ContractError for a log that cannot be read, or
    logs of several forms. Of several files, one that cannot be read is a log with the reason."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    reader, log_files = recognized(path, files, choices)
    if reader is None:
        return []
    logs = []
    if reader.name == OWN and len(files) > 1:
        logs += hidden_logs(files, log_files, choices)
    gc.disable()  # it would look at a million lines again and again, half of the time
    try:
        for file in log_files:
            logs += logs_of(file, reader, choices, alone=len(files) == 1)
    finally:
        gc.enable()
    merged = []
    for members in grouped(logs):
        log = members[0] if len(members) == 1 else _merged(members)
        merged.append((members[0].files[0], log))
    return merged


def recognized(
    path: Path, files: Sequence[Path], choices: Choices
) -> tuple[Reader | None, list[Path]]:
    """The reader of these files, None if no file is a log, and those of them that are. Score files
    take precedence; ContractError if the others are of several forms."""
    logs_of_reader: dict[Reader, list[Path]] = {}
    for reader in sorted(readers().values(), key=lambda reader: reader.name != OWN):
        logs = [file for file in files if reader.takes(file, choices)]
        if logs and reader.name == OWN:
            return reader, logs
        if logs:
            logs_of_reader[reader] = logs
    if len(logs_of_reader) > 1:
        examples = [
            f"{reader.name}: {logs[0]}" for reader, logs in logs_of_reader.items()
        ]
        raise ContractError(
            f"{path} has logs of {len(examples)} forms ({'; '.join(examples)}); "
            "name the folder or file of one"
        )
    for reader, logs in logs_of_reader.items():
        return reader, logs
    return None, []


def hidden_logs(
    files: Sequence[Path], score_files: Sequence[Path], choices: Choices
) -> list[Log]:
    """A log for each form that score files hide, which says so."""
    others = sorted(set(files) - set(score_files))
    logs = []
    for reader in readers().values():
        hidden = []
        for file in others:
            with suppress(ContractError, OSError):
                if reader.takes(file, choices):
                    hidden.append(file)
        if not hidden:
            continue
        reason = (
            f"logs of the form {reader.name} ({len(hidden)}; first: {hidden[0]}), since the folder "
            "has score files, which are read alone; name the file or folder of one form"
        )
        about = {"benchmark": hidden[0].stem, "files": (hidden[0],)}
        logs.append(Log(**about, metrics={}, items=[], unknown=reason))
    return logs


def logs_of(file: Path, reader: Reader, choices: Choices, *, alone: bool) -> list[Log]:
    """The logs in a file. If it is not ``alone`` and cannot be read, one that says why."""
    for name in choices.names():
        if name not in reader.choices:
            takes = ", ".join(f"--{choice}" for choice in reader.choices)
            raise ContractError(
                f"{file} is of {reader.name}, for which --{name} means nothing; "
                f"it takes {takes or 'no such option'}"
            )
    try:
        with errors_about(file):
            if file.stat().st_size == 0:
                raise ContractError(f"{file} is empty; was the run cut off?")
            if reader.choices:
                logs = list(reader.read(file, choices))
            else:
                logs = list(reader.read(file))
    except ContractError as error:
        if alone:
            raise
        logs = [Log(benchmark=file.stem, metrics={}, items=[], unknown=str(error))]
    return [replace(log, files=(file,)) for log in logs]


def grouped(logs: Iterable[Log]) -> list[list[Log]]:
    """The logs, those of one group together."""
    groups: dict[Any, list[Log]] = {}
    for number, log in enumerate(logs):
        groups.setdefault(log.group or number, []).append(log)
    return list(groups.values())


def _merged(members: Sequence[Log]) -> Log:
    """The log of a group."""
    first = members[0]
    name, metric, printed, aggregate, _ = first.group
    items = []
    files: list[Path] = []
    notes: list[str] = []
    for log in members:
        task = log.benchmark.removesuffix(f" {metric}")
        for item in log.items:
            about = {
                "id": f"{task}/{item['id']}",
                "cluster": f"{task}/{item['cluster']}",
                "category": task,
            }
            items.append({**item, **about})
        files += log.files
        notes += log.notes
    return Log(
        benchmark=f"{name} {metric}",
        metrics={},
        items=items,
        files=tuple(files),
        model=first.model,
        printed=printed,
        aggregate=aggregate,
        notes=list(dict.fromkeys(notes)),
        documents=documents_of_all(members),
    )


def documents_of_all(members: Sequence[Log]) -> tuple[int, int] | None:
    """How many documents the logs of a group have, and how many were evaluated."""
    logged = 0
    evaluated = 0
    for log in members:
        if log.documents is None:
            return None
        logged += log.documents[0]
        evaluated += log.documents[1]
    return logged, evaluated


def mme_logs(
    items: list[dict[str, Any]], printed: Sequence[float | None], **about: Any
) -> Iterator[Log]:
    """MME's two composites, of items with the image in ``cluster``; ``printed``: of perception and
    cognition."""
    parts = {"mme": PERCEPTION, "MME cognition": COGNITION}
    for (name, categories), number in zip(parts.items(), printed, strict=True):
        if chosen := [item for item in items if item["category"] in categories]:
            yield Log(
                benchmark=name,
                metrics={},
                items=chosen,
                aggregate="MME",
                printed=number,
                **about,
            )


def number(value: Any, where: str) -> float:
    """A score, which a table has as text, as a number. True is 1. ContractError for anything
    else."""
    if isinstance(value, str) and "_" not in value:  # Python reads 1_0 as 10
        with suppress(ValueError):
            value = float({"true": "1", "false": "0"}.get(value.lower(), value))
    if isinstance(value, (int, float)) and abs(value) <= 1e12:
        return float(value)
    raise ContractError(f"{where} is {value!r}; expected a finite number")


def negated(log: Log, metric: str) -> Log:
    """The log of a metric of which less is better, with negative scores already: its printed number
    is negated, too, and it is not one of a group, whose number is not."""
    note = f"{metric}: lower is better, so its negative is compared"
    printed = log.printed
    if printed is not None:
        printed = -printed
    return replace(log, printed=printed, group=(), notes=[*log.notes, note])


def short_text(value: Any) -> str:
    """A question or an answer as items keep it for the page; "" for what is no text."""
    return value[:LONGEST_TEXT] if isinstance(value, str) else ""


def shown_texts(question: Any, answer: Any) -> dict[str, str]:
    """The fields ``question`` and ``answer`` of an item, those that are texts. An answer that a log
    does not have is no empty one."""
    texts = {}
    for name, value in (("question", question), ("answer", answer)):
        if isinstance(value, str):
            texts[name] = short_text(value)
    return texts


def all_answers(answers: Sequence[Any]) -> dict[str, Any]:
    """What tells the answers of an item from others, if its score is the mean of several; the item
    shows the first."""
    if len(answers) < 2:
        return {}
    return {"repeats": len(answers), "response_hash": digest_of(list(answers))}


def digest_of(value: Any) -> str:
    """Sixteen digits that tell a JSON value from others."""
    return sha256_text(json.dumps(value, sort_keys=True, default=str))[:16]


def first_of(values: Mapping[str, Any], names: Iterable[str]) -> str:
    """The first of these fields that is a text or a number, as text; "" if there is none."""
    for name in names:
        if isinstance(values.get(name), (str, int)):
            return str(values[name])
    return ""
