"""inspect_ai's logs, ``.eval`` (a zip file) or ``.json``; the value of the log's headline scorer,
mean over epochs."""

import json
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_integration.evaluator.compare.readers import (
    IMAGES,
    Choices,
    Log,
    Reader,
    all_answers,
    file_formats,
    first_of,
    number,
    short_text,
)
from llava_integration.evaluator.compare.readers.harness_lines import CATEGORIES
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.json_files import read_json_value

# correct, partially correct, incorrect, no answer
GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}


def fits(path: Path) -> bool:
    """Recognized by its ending, even if it was cut, or by JSON that begins with the log's version
    and status."""
    with path.open("rb") as file:
        head = file.read(4096)
    return file_formats.ending_of(path) == ".eval" or all(
        name in head for name in (b'"status"', b'"eval"', b'"run_id"')
    )


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A log's header and its samples."""
    if file_formats.ending_of(path) == ".json":
        log = read_json_value(path)
        return log, log.get("samples") or []
    if sys.version_info < (3, 14):
        import zipfile_zstd  # noqa: F401 - teaches zipfile zstd, which newer logs are compressed with
    with (
        errors_about(path, fix="was the run cut off?"),
        zipfile.ZipFile(path) as archive,
    ):
        refuse_large(path, archive, ["header.json", "summaries.json"])
        header = json.loads(archive.read("header.json"))
        samples = json.loads(archive.read("summaries.json"))
        if samples and not any("metadata" in sample for sample in samples):
            # older summaries have none, so what goes together is in the samples alone
            names = [name for name in archive.namelist() if name.startswith("samples/")]
            refuse_large(path, archive, names)
            samples = [json.loads(archive.read(name)) for name in names]
        return header, samples


def refuse_large(path: Path, archive: zipfile.ZipFile, names: Sequence[str]) -> None:
    """Raise ContractError for members that unpack to more than fits the memory."""
    unpacked = sum(archive.getinfo(name).file_size for name in names)
    if unpacked > file_formats.MOST_UNPACKED:
        fix = "convert it (inspect log convert --to json)"
        raise file_formats.too_large(path, f"{unpacked:,}", fix=fix)


def read(path: Path, choices: Choices) -> Iterator[Log]:
    """Raises ContractError for a log without scores, or with samples that its scorer did not
    judge."""
    header, samples = load(path)
    results = header.get("results") or {}
    about = header.get("eval", {})
    task = about.get("task", path.stem)
    scorer = scorer_of(path, results, choices.scorer)
    if header.get("status") != "success":
        raise ContractError(
            f"{path}: the run's status is {header.get('status')!r}; only a finished run counts"
        )
    if not scorer:
        raise ContractError(
            f"{path} has no scores; run `inspect score` on it, or give the task a scorer"
        )
    scores = Scores(path=path, scorer=scorer, group=choices.group)
    for sample in samples:
        scores.add(sample)
    documents = (about.get("dataset") or {}).get("samples") or 0
    notes = [*scores.group_notes(task), *scores.size_notes(task, documents)]
    yield Log(
        benchmark=f"{task} {scorer}",
        metrics={},
        items=list(scores.items.values()),
        model=str(about.get("model", "")),
        printed=printed_mean(results, scorer),
        notes=notes,
    )


def scorer_of(path: Path, results: dict[str, Any], chosen: str) -> str:
    """The chosen scorer, or the headline's, or the first; "" if there is none."""
    scores = results.get("scores") or []
    scorers = [str(score.get("scorer")) for score in scores]
    if chosen and chosen not in scorers:
        raise ContractError(
            f"{path} has no scorer {chosen}; it has {', '.join(scorers)}"
        )
    headline = results.get("headline") or next(iter(scores), {})
    return chosen or headline.get("scorer") or ""


@dataclass(kw_only=True)
class Scores:
    """The scores of a log's samples, as they are added."""

    path: Path
    scorer: str
    group: str  # field of the metadata; "": images
    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)  # of each epoch
    answers: dict[str, list[Any]] = field(default_factory=dict)
    without_score: set[str] = field(default_factory=set)
    # sample -> what it has in the group's place
    without_group: dict[str, Any] = field(default_factory=dict)

    def add(self, sample: dict[str, Any]) -> None:
        """Add one epoch of a sample."""
        name = str(sample.get("id"))
        score = (sample.get("scores") or {}).get(self.scorer) or {}
        value = score.get("value")
        if value is None:  # a sample that failed, which inspect_ai doesn't count either
            self.without_score.add(name)
            return
        if isinstance(value, str):
            value = GRADES.get(value, value)
        value = number(value, f"{self.path}, sample {name}: {self.scorer}")
        values = self.values.setdefault(name, [])
        values.append(value)
        metadata = sample.get("metadata") or {}
        item = {
            "id": name,
            "truth": sample.get("target"),
            "cluster": self.cluster_of(name, metadata),
            "category": first_of(metadata, CATEGORIES),
        }
        question = question_of(sample.get("input"))
        if question:
            item["question"] = question
        answer = score.get("answer")
        if not isinstance(answer, str):
            answer = (sample.get("output") or {}).get("completion")
        if isinstance(answer, str):
            item["answer"] = short_text(answer)
        answers = self.answers.setdefault(name, [])
        answers.append(answer)
        if sample.get("choices"):
            item["choices"] = [short_text(choice) for choice in sample["choices"]]
        item = self.items.setdefault(name, item)
        item["score"] = sum(values) / len(values)
        item.update(all_answers(answers))

    def cluster_of(self, name: str, metadata: dict[str, Any]) -> str:
        """What a sample goes together with; the sample itself if nothing says so."""
        if not self.group:
            return first_of(metadata, IMAGES) or name
        if self.group not in metadata:
            raise ContractError(
                f"{self.path}, sample {name}: its metadata have no {self.group}"
            )
        cluster = group_of(metadata, self.group)
        if not cluster:
            self.without_group[name] = metadata[self.group]
        return cluster or name

    def group_notes(self, task: str) -> list[str]:
        """A note if some samples have no group; ContractError if none has."""
        if not self.without_group:
            return []
        name, value = next(iter(self.without_group.items()))
        problem = (
            f"sample {name}: {self.group} is {value!r:.60}, not a text or a number"
        )
        if len(self.without_group) == len(self.items):
            raise ContractError(
                f"{self.path}, {problem}, nor is it in any other sample; choose another --group"
            )
        return [
            f"{task}: {len(self.without_group)} samples have no group, so each is one by itself "
            f"({problem})"
        ]

    def size_notes(self, task: str, documents: int) -> list[str]:
        """A note if the log lacks scores of some of the task's samples."""
        lost = self.without_score - set(self.items)
        if lost:
            return [
                f"{task}: {len(lost)} samples have no score of {self.scorer}; left out"
            ]
        if len(self.items) < documents:
            return [
                f"{task}: the log has {len(self.items):,} of the task's {documents:,} samples; "
                "the number is of these alone"
            ]
        return []


def question_of(content: Any) -> str:
    """The question of a sample: its text, or the last that a user said in its messages."""
    if not isinstance(content, list):
        return short_text(content)
    question = ""
    for message in content:
        if isinstance(message, dict) and message.get("role") == "user":
            question = text_of(message.get("content"))
    return short_text(question)


def text_of(content: Any) -> str:
    """The text of a message, which may have pictures between its parts."""
    if not isinstance(content, list):
        return short_text(content)
    parts = [part.get("text") for part in content if isinstance(part, dict)]
    return "\n".join(part for part in parts if isinstance(part, str))


def group_of(metadata: dict[str, Any], field: str) -> str:
    """The value of a field that tells which samples go together; "" for none that can."""
    value = metadata[field]
    return str(value) if isinstance(value, (str, int, float)) else ""


def printed_mean(results: dict[str, Any], scorer: str) -> float | None:
    """The accuracy or mean that inspect_ai computed; None if the scorer has another metric."""
    for score in results.get("scores") or []:
        metrics = score.get("metrics") or {}
        for name in ("accuracy", "mean"):
            if score.get("scorer") == scorer and name in metrics:
                return float(metrics[name]["value"])
    return None


READER = Reader(
    name="inspect_ai",
    endings=(".eval", ".json"),
    fits=fits,
    read=read,
    choices=("group", "scorer"),
)
