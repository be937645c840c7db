"""lmms-eval, with ``--log_samples``: ``DATE_samples_TASK.jsonl`` next to ``DATE_results.json``, or,
up to 0.2.2, ``TASK.json``, an object with ``logs``, next to ``results.json``.

A metric's value is a number, or an object with what the task's aggregation reads: MME, POPE,
MMBench, MMVP, MMStar and captions become their composites; of other objects the field ``score``
counts, or whether the answer is right.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_integration.evaluator.benchmarks.rules.mmbench import (
    ROTATION,
    choices_of,
    letter_of,
)
from llava_integration.evaluator.compare.readers import (
    BY_PART,
    Choices,
    Log,
    Reader,
    mme_logs,
    number,
)
from llava_integration.evaluator.compare.readers.cider import cider
from llava_integration.evaluator.compare.readers.file_formats import (
    ending_of,
    first_object,
    json_objects,
)
from llava_integration.evaluator.compare.readers.harness_lines import (
    ALONE,
    HARNESS_NAME,
    LMMS_NAME,
    NO_DOCUMENTS,
    NO_METRICS,
    POPE_IMAGE,
    SHOWN,
    Lines,
    fields,
    is_harness_line,
    item_of,
    lines_of,
)
from llava_integration.evaluator.compare.readers.harness_results import (
    Summary,
    model_named_in,
)
from llava_integration.evaluator.compare.readers.harness_scores import scored
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.json_files import read_json_value

PROMPTS = "answers to lmms-eval's prompts, which may differ from LLaVA's"
MME_METRICS = ("mme_perception_score", "mme_cognition_score")


def fits(path: Path) -> bool:
    """Recognized by its name, by a line with a document's hash that is not the harness's, or by an
    object that begins with the arguments of the run."""
    if LMMS_NAME.search(path.name):
        return True
    if HARNESS_NAME.search(path.name):
        return False
    if ending_of(path) == ".json":
        return is_old(path)
    line = first_object(path)
    return {"doc_id", "doc_hash"} <= set(line) and not is_harness_line(line)


def is_old(path: Path) -> bool:
    """Whether a file is TASK.json of lmms-eval up to 0.2.2."""
    with path.open("rb") as file:
        head = file.read(4096)
    starts = head.replace(b" ", b"").replace(b"\n", b"").startswith(b'{"args":{')
    return starts and b'"log_samples"' in head


def read(path: Path, choices: Choices) -> Iterator[Log]:
    """The task's composite, or its first metric that has a number for each document."""
    summary = Summary(path, LMMS_NAME, "{}_results.json", groups=BY_PART)
    if ending_of(path) == ".json" and is_old(path):
        body = read_json_value(path)
        logged = body["logs"]
        if not logged:
            raise ContractError(f"{path} {NO_DOCUMENTS}")
        summary.model = model_named_in({"config": body["args"]})
        objects = [(f"{path}, log {n}", line) for n, line in enumerate(logged, 1)]
        first_line = dict(logged[0])
    else:
        objects = json_objects(path)
        first_line = first_object(path)
    lines = lines_of(objects, choices.group)
    if not lines:
        raise ContractError(f"{path} {NO_DOCUMENTS}")
    for log in logs_of_task(lines, summary, first_line, choices.metric):
        if all(item["cluster"] == str(item["id"]) for item in log.items):
            log.notes.append(ALONE)
        log.notes.extend(summary.size_notes(lines))
        yield replace(log, documents=summary.documents_in(lines))


def logs_of_task(
    lines: Lines, summary: Summary, first_line: dict[str, Any], metric: str
) -> list[Log]:
    """The logs of a task, of the chosen ``metric`` if there is one."""
    metrics = [metric] if metric else list(first_line)
    composite, make = composite_of(metrics)
    if metric and make is None:
        return [scored(lines, summary, metrics)]
    if summary.task.startswith("mmbench_"):
        return [_mmbench(lines, summary, "submission")]
    if summary.task.startswith("mmstar"):
        return [_mmstar(lines, summary, "average")]
    if is_hrbench(lines):
        return [_hrbench(lines, summary, "average")]
    if set(MME_METRICS) & set(metrics):
        return list(_mme(lines, summary))
    if make is not None:
        return [make(lines, summary, composite)]
    # the results' file lists a task's metrics in its order
    ordered = dict.fromkeys((*summary.better, *metrics))
    candidates = [name for name in ordered if name not in NO_METRICS]
    return [scored(lines, summary, candidates)]


def is_hrbench(lines: Lines) -> bool:
    """Whether the first line is HR-Bench's, whose metrics are named by its categories."""
    _, line = lines[0]
    value = line.get("average")
    return isinstance(value, dict) and "cycle_category" in value


def composite_of(
    metrics: list[str],
) -> tuple[str, Callable[[Lines, Summary, str], Log] | None]:
    """The first metric that is a composite, and what makes its log; ("", None) if there is none."""
    for metric in metrics:
        for ending, make in COMPOSITES.items():
            if metric.endswith(ending):
                return metric, make
    return "", None


def _mme(lines: Lines, summary: Summary) -> Iterator[Log]:
    """An item for each question; the two of an image differ in their order."""
    items: list[dict[str, Any]] = []
    questions_of_image: Counter[str] = Counter()
    for where, line in lines:
        value = line.get("mme_perception_score") or line.get("mme_cognition_score")
        value = fields(value, "question_id category score", where)
        image = f"{value['category']}/{value['question_id']}"
        questions_of_image[image] += 1
        items.append(
            {
                "id": f"{image}#{questions_of_image[image]}",
                "category": value["category"],
                "cluster": image,
                "score": number(value["score"], f"{where}: score"),
                "truth": line.get("target"),
                **line.get(SHOWN, {}),
            }
        )
    printed = [summary.printed(metric) for metric in MME_METRICS]
    yield from mme_logs(items, printed, model=summary.model, notes=[PROMPTS])


def _pope(lines: Lines, summary: Summary, metric: str) -> Log:
    """lmms-eval's F1 is over all questions, not the mean of three parts, so there is one category.
    An answer that is neither yes nor no is no positive, and its question is left out of recall."""
    items = []
    for where, line in lines:
        value = fields(line.get(metric), "score prediction ground_truth", where)
        answer = value["prediction"]
        item = item_of(line, line, value["score"])
        picture = (line.get("doc") or {}).get(POPE_IMAGE)
        if picture and item["cluster"] == str(item["id"]):
            item["cluster"] = str(picture)
        item = {
            **item,
            "category": "",
            "truth": value["ground_truth"],
            "label": value["ground_truth"],
            "parsed": answer,
            "missing": answer not in ("yes", "no"),
        }
        items.append(item)
    # parts, not runs
    is_part = summary.task.endswith(("_adv", "_pop", "_random"))
    name = f"{summary.task} F1" if is_part else "pope"
    return summary.log(metric, items, name, aggregate="pope", notes=[PROMPTS])


# tasks whose number is a benchmark's of ours; others, as mmbench_en_dev_lite, are not its runs
MMBENCH = {"mmbench_en_dev": "mmbench", "mmbench_cn_dev": "mmbench_cn"}


def _mmbench(lines: Lines, summary: Summary, metric: str) -> Log:
    """A group of rotations each, as ``llm2clip score`` reads the answers: lmms-eval logs no
    judgement of them."""
    groups: dict[int, dict[str, Any]] = {}
    for where, line in lines:
        value = fields(line.get(metric), "index prediction answer category", where)
        group = int(number(value["index"], f"{where}: index")) % ROTATION
        new_item = {"id": group, "score": 1, "cluster": f"group {group}", "rows": []}
        item = groups.setdefault(group, new_item)
        choices = choices_of({name: str(cell) for name, cell in value.items()})
        letter = letter_of(str(value["prediction"]), choices)
        is_right = letter == value["answer"]
        item["score"] *= int(is_right)
        item["rows"].append({"text": str(value["prediction"]), "correct": is_right})
        if value["index"] == group and choices and value["answer"] in tuple("ABCDE"):
            item["truth"] = value["answer"]
            item["category"] = value["category"]
            item.update(line.get(SHOWN, {}))
            item["choices"] = list(choices.values())
    items = [item for item in groups.values() if "truth" in item]
    if not items:
        where, _ = lines[0]
        problem = f"{where}: {summary.task} has no options, or answers of its server's"
        return summary.log("", [], unknown=problem)
    task = summary.task.removesuffix("_static")
    name = MMBENCH.get(task, f"{task} circular")
    printed = summary.printed("gpt_eval_score")
    if printed:
        printed = printed / 100
    return summary.log(metric, items, name, printed=printed, notes=[PROMPTS])


def _pairs(lines: Lines, summary: Summary, metric: str) -> Log:
    """MMVP: two images of a pair, of which both must be right; a lone one does not count."""
    pairs: dict[str, list[tuple[bool, dict[str, Any]]]] = {}
    for where, line in lines:
        value = fields(line.get(metric), "pair_index is_correct", where)
        question = (bool(value["is_correct"]), line.get(SHOWN, {}))
        pairs.setdefault(str(value["pair_index"]), []).append(question)
    items = []
    for pair, both in pairs.items():
        if len(both) != 2:
            continue
        (is_right, texts), (is_other_right, other_texts) = both
        item: dict[str, Any] = {"id": pair, "cluster": f"pair {pair}"}
        item["score"] = int(is_right and is_other_right)
        if "choices" in texts and "choices" in other_texts:
            item |= {"choices": texts["choices"], "turns": 2}
        for name, text in texts.items():
            if name == "choices":
                continue
            item[name] = f"{text} | {other_texts.get(name, '')}"
        items.append(item)
    return summary.log(metric, items)


def _mmstar(lines: Lines, summary: Summary, metric: str) -> Log:
    """Each ability (l2_category) has equal weight."""
    items = []
    for where, line in lines:
        value = fields(line.get(metric), "l2_category score", where)
        score = number(value["score"], f"{where}: score")
        items.append(item_of(line, value, score) | {"category": value["l2_category"]})
    return summary.log(metric, items, aggregate=BY_PART)


def _mlvu(lines: Lines, summary: Summary, metric: str) -> Log:
    """Each kind of task has equal weight; the number is in percent."""
    items = []
    for where, line in lines:
        value = fields(line.get(metric), "task_type pred_answer answer", where)
        score = int(value["pred_answer"] == value["answer"])
        items.append(item_of(line, line, score) | {"category": value["task_type"]})
    printed = summary.printed(metric)
    if printed is not None:
        printed = printed / 100
    return summary.log(metric, items, aggregate=BY_PART, printed=printed)


def _hrbench(lines: Lines, summary: Summary, metric: str) -> Log:
    """Each rotation of the options has equal weight."""
    items = []
    for where, line in lines:
        value = fields(line.get(metric), "cycle_category gpt_score", where)
        item = item_of(line, line, value["gpt_score"])
        items.append(item | {"category": str(value["cycle_category"])})
    return summary.log(metric, items, aggregate=BY_PART)


def _boxes(lines: Lines, summary: Summary, metric: str) -> Log:
    """RefCOCO's boxes: how far the answer's and the true one overlap, or whether they do enough."""
    items = []
    for where, line in lines:
        value = fields(line.get(metric), "bbox pred", where)
        score = box_score(metric, value["bbox"], value["pred"])
        items.append(item_of(line, line, score) | {"truth": value["bbox"]})
    return summary.log(metric, items)


def box_score(metric: str, truth: Sequence[float], answer: Sequence[float]) -> float:
    """The score of a box (left, top, right, bottom) under a metric such as IoU, ACC@0.5 or
    Center_ACC."""
    if metric.endswith("Center_ACC"):
        x = (answer[0] + answer[2]) / 2
        y = (answer[1] + answer[3]) / 2
        return float(truth[0] <= x <= truth[2] and truth[1] <= y <= truth[3])
    overlap = intersection_over_union(truth, answer)
    _, _, threshold = metric.partition("ACC@")
    return float(overlap >= float(threshold)) if threshold else overlap


def intersection_over_union(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two boxes, 0 if both are empty."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    union = sum(areas) - shared
    return shared / union if union else 0.0


def _cider(lines: Lines, summary: Summary, metric: str) -> Log:
    """Each caption's score against its image's references."""
    values = [fields(line.get(metric), "answer pred", where) for where, line in lines]
    captions = []
    references = []
    for value in values:
        truth = value["answer"]
        captions.append(str(value["pred"]))
        references.append(
            [str(text) for text in truth] if isinstance(truth, list) else [str(truth)]
        )
    scores = cider(captions, references)
    items = []
    for (_, line), value, score in zip(lines, values, scores, strict=True):
        items.append(item_of(line, value, score))
    notes = [
        "CIDEr: document frequencies are those of all references of the log, and stay fixed"
    ]
    return summary.log(metric, items, aggregate="CIDEr", notes=notes)


# what the name of a metric ends in: the log made of it
COMPOSITES = {
    "pope_f1_score": _pope,
    "mmvp_pair_accuracy": _pairs,
    "CIDEr": _cider,
    "mlvu_percetion_score": _mlvu,
    "_IoU": _boxes,
    "_ACC@0.1": _boxes,
    "_ACC@0.3": _boxes,
    "_ACC@0.5": _boxes,
    "_ACC@0.7": _boxes,
    "_ACC@0.9": _boxes,
    "_Center_ACC": _boxes,
}

READER = Reader(
    name="lmms-eval",
    endings=(".jsonl", ".jsonl.gz", ".json"),
    fits=fits,
    read=read,
    choices=("group", "metric"),
)
