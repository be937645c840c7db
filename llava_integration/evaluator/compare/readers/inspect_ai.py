"""inspect_ai's logs, ``.eval`` (a zip file) or ``.json``; the value of the log's headline scorer,
mean over epochs."""

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_integration.evaluator.compare.readers import (
    IMAGES,
    Choices,
    Log,
    Reader,
    first_of,
    number,
    short_text,
)
from llava_integration.evaluator.compare.readers.lm_eval import CATEGORIES
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.json_files import read_json_value

# correct, partially correct, incorrect, no answer
GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}


def fits(path: Path) -> bool:
    """Recognized by its ending, even if it was cut, or by JSON that begins with the log's version
    and status."""
    with path.open("rb") as file:
        head = file.read(4096)
    return path.suffix == ".eval" or all(
        name in head for name in (b'"status"', b'"eval"', b'"run_id"')
    )


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A log's header and its samples."""
    if path.suffix == ".json":
        log = read_json_value(path)
        return log, log.get("samples") or []
    if sys.version_info < (3, 14):
        import zipfile_zstd  # noqa: F401 - teaches zipfile zstd, which newer logs are compressed with
    with (
        errors_about(path, fix="was the run cut off?"),
        zipfile.ZipFile(path) as archive,
    ):
        return json.loads(archive.read("header.json")), json.loads(
            archive.read("summaries.json")
        )


def read(path: Path, choices: Choices) -> Iterator[Log]:
    """Raises ContractError for a log without scores, or with samples that its scorer did not
    judge."""
    header, samples = load(path)
    results = header.get("results") or {}
    about = header.get("eval", {})
    scorer = (
        results.get("headline") or next(iter(results.get("scores") or []), {})
    ).get("scorer")
    scorers = [str(score.get("scorer")) for score in results.get("scores") or []]
    if choices.scorer and choices.scorer not in scorers:
        raise ContractError(
            f"{path} has no scorer {choices.scorer}; it has {', '.join(scorers)}"
        )
    scorer = choices.scorer or scorer
    if header.get("status") != "success":
        raise ContractError(
            f"{path}: the run's status is {header.get('status')!r}; only a finished run counts"
        )
    if not scorer:
        raise ContractError(
            f"{path} has no scores; run `inspect score` on it, or give the task a scorer"
        )
    values: dict[str, list[float]] = {}
    without_score: set[str] = set()
    without_group: dict[str, Any] = {}  # sample -> what it has in the group's place
    items: dict[str, dict[str, Any]] = {}
    for sample in samples:
        name = str(sample.get("id"))
        of = sample.get("metadata") or {}
        score = (sample.get("scores") or {}).get(scorer) or {}
        value = score.get("value")
        if value is None:  # a sample that failed, which inspect_ai doesn't count either
            without_score.add(name)
            continue
        value = GRADES.get(value, value) if isinstance(value, str) else value
        values.setdefault(name, []).append(
            number(value, f"{path}, sample {name}: {scorer}")
        )
        if choices.group and choices.group not in of:
            raise ContractError(
                f"{path}, sample {name}: its metadata have no {choices.group}"
            )
        cluster = group_of(of, choices.group) if choices.group else first_of(of, IMAGES)
        if choices.group and not cluster:
            without_group[name] = of[choices.group]
        said = {"cluster": cluster or name, "category": first_of(of, CATEGORIES)}
        texts = {"question": sample.get("input"), "answer": score.get("answer")}
        said |= {
            field: short_text(text) for field, text in texts.items() if short_text(text)
        }
        items.setdefault(name, {"id": name, "truth": sample.get("target"), **said})
        items[name]["score"] = sum(values[name]) / len(values[name])
    task = about.get("task", path.stem)
    model = str(about.get("model", ""))
    notes = []
    if without_group:
        name, value = next(iter(without_group.items()))
        problem = (
            f"sample {name}: {choices.group} is {value!r:.60}, not a text or a number"
        )
        if len(without_group) == len(items):
            raise ContractError(
                f"{path}, {problem}, nor is it in any other sample; choose another --group"
            )
        notes.append(
            f"{task}: {len(without_group)} samples have no group, so each is one by itself "
            f"({problem})"
        )
    samples_of_task = (about.get("dataset") or {}).get("samples") or 0
    if lost := without_score - set(items):
        notes.append(f"{task}: {len(lost)} samples have no score of {scorer}; left out")
    elif len(items) < samples_of_task:
        notes.append(
            f"{task}: the log has {len(items):,} of the task's {samples_of_task:,} samples; "
            "the number is of these alone"
        )
    yield Log(
        benchmark=f"{task} {scorer}",
        metrics={},
        items=list(items.values()),
        model=model,
        printed=printed_mean(results, scorer),
        notes=notes,
    )


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
