"""lmms-eval, ``--log_samples``: ``DATE_samples_TASK.jsonl`` next to ``DATE_results.json``.

A metric's value is a number, or an object with what the task's aggregation reads. MME, POPE and MMBench become their
composites; of other objects the field ``score`` counts, or whether ``pred`` is ``answer``.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava_integration.benchmarks.answers import json_lines
from llava_integration.benchmarks.rules.mmbench import ROTATION, choices_of, letter_of
from llava_integration.compare.readers import Reader, first_object, number
from llava_integration.compare.readers.lm_eval import image_of, scored, summary_of
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.files import ContractError

NAME = re.compile(r"(?P<date>\d{8}_\d{6})_samples_(?P<task>.+)\.jsonl$")
Line = dict[str, Any]


def fits(path: Path) -> bool:
    """Its name says so, or a line has the hash of its document and, unlike lm-evaluation-harness's, no metrics."""
    line = first_object(path)
    return bool(NAME.search(path.name)) or ({"doc_id", "doc_hash"} <= set(line) and "metrics" not in line)


def _mme(path: Path) -> list[Line]:
    """An item for each question; the two of an image differ in their order."""
    items: list[Line] = []
    seen: Counter[str] = Counter()
    for where, line in json_lines(path):
        value = line.get("mme_perception_score") or line.get("mme_cognition_score")
        value = with_fields(value, ("question_id", "category", "score"), where)
        image = str(value["question_id"])
        seen[image] += 1
        items.append({"id": f"{image}#{seen[image]}", "category": value["category"], "cluster": image})
        items[-1] |= {"score": number(value["score"], f"{where}: score"), "truth": line.get("target")}
    return items


def _pope(path: Path) -> list[Line]:
    """lmms-eval's F1 is over all questions, not the mean of three parts, so there is one category.

    An answer that is neither yes nor no is no positive, and its question is left out of recall.
    """
    items = []
    for where, line in json_lines(path):
        value = with_fields(line.get("pope_f1_score"), ("question_id", "score", "prediction", "ground_truth"), where)
        said, true = value["prediction"], value["ground_truth"]
        items.append({"id": line["doc_id"], "cluster": image_of(line), "category": "", "truth": true})
        items[-1] |= {"score": value["score"], "parsed": said, "label": true}
        items[-1]["missing"] = said not in ("yes", "no")
    return items


def _mmbench(path: Path) -> list[Line]:
    """A group of rotations each, as ``llm2clip score`` reads the answers; lmms-eval's own number needs a judge."""
    groups: dict[int, Line] = {}
    for where, line in json_lines(path):
        value = with_fields(line.get("submission"), ("index", "prediction", "answer", "category"), where)
        group = int(value["index"]) % ROTATION
        item = groups.setdefault(group, {"id": group, "score": 1, "cluster": f"group {group}"})
        item["score"] *= int(letter_of(str(value["prediction"]), choices_of(value)) == value["answer"])
        if value["index"] == group:
            item |= {"truth": value["answer"], "category": value["category"]}
    return [item for item in groups.values() if "truth" in item]


COMPOSITES: dict[str, tuple[str, Callable[[Path], list[Line]]]] = {  # a metric of the log: (benchmark, its items)
    "mme_perception_score": ("mme", _mme),
    "mme_cognition_score": ("mme", _mme),
    "pope_f1_score": ("pope", _pope),
}


NO_METRICS = {"doc_id", "token_counts"}  # numbers of a line that are none


def read(path: Path) -> Iterator[ScoreFile]:
    """The task's composite, or its first metric that has a number for each document."""
    name = NAME.search(path.name)
    task = name["task"] if name else path.stem
    model, better = summary_of(path.with_name(f"{name['date']}_results.json") if name else None, task)
    start = first_object(path)
    composite = next((COMPOSITES[metric] for metric in start if metric in COMPOSITES), None)
    if task.startswith("mmbench_"):
        composite = ("mmbench_cn" if task.startswith("mmbench_cn") else "mmbench", _mmbench)
    if composite:
        said = ["answers to lmms-eval's prompts, which may differ from LLaVA's"]
        record = ScoreFile(benchmark=composite[0], metrics={}, items=composite[1](path), model=model, notes=said)
    else:
        metrics = [one for one in dict.fromkeys((*better, *start)) if one not in NO_METRICS]
        record = scored(list(json_lines(path)), task=task, metrics=metrics, better=better, model=model)
    if all(item["cluster"] == str(item["id"]) for item in record.items):
        record.notes.append(
            "the log names no images: questions are drawn one by one, so the interval may be too narrow"
        )
    yield record


def with_fields(value: Any, names: tuple[str, ...], where: str) -> Line:
    """The object, which must have these fields; ContractError."""
    if not isinstance(value, dict) or any(name not in value for name in names):
        raise ContractError(f"{where}: the metric is {str(value)[:80]}; expected an object with {', '.join(names)}")
    return value


READER = Reader(name="lmms-eval", endings=(".jsonl",), fits=fits, read=read)
