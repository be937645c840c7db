"""lmms-eval, ``--log_samples``: ``DATE_samples_TASK.jsonl`` next to ``DATE_results.json``.

A metric's value is a number, or an object with what the task's aggregation reads. MME, POPE, MMBench, MMVP, MMStar and
captions become their composites; of other objects the field ``score`` counts, or whether the answer is right.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from llava_integration.benchmarks.answers import json_lines
from llava_integration.benchmarks.rules.mmbench import ROTATION, choices_of, letter_of
from llava_integration.compare.readers import BY_PART, Log, Reader, first_object, mme_logs, number
from llava_integration.compare.readers.lm_eval import Lines, Summary, item_of, scored
from llm2clip_plugin.files import ContractError

NAME = re.compile(r"(?P<date>\d{8}_\d{6})_samples_(?P<task>.+)\.jsonl$")
NO_METRICS = {"doc_id", "token_counts"}  # numbers of a line that are none
PROMPTS = "answers to lmms-eval's prompts, which may differ from LLaVA's"


def fits(path: Path) -> bool:
    """Recognized by its name, or by a line with a document's hash and, unlike lm-evaluation-harness, no metrics."""
    line = first_object(path)
    return bool(NAME.search(path.name)) or ({"doc_id", "doc_hash"} <= set(line) and "metrics" not in line)


def read(path: Path) -> Iterator[Log]:
    """The task's composite, or its first metric that has a number for each document."""
    name = NAME.search(path.name)
    task = name["task"] if name else path.stem
    summary = Summary(path.with_name(f"{name['date']}_results.json") if name else None, task, groups=BY_PART)
    lines, start = list(json_lines(path)), first_object(path)
    metric = next((one for one in start for known in COMPOSITES if one.endswith(known)), "")
    make = next((make for known, make in COMPOSITES.items() if metric.endswith(known)), None)
    if task.startswith(("mmbench_", "mmstar")):
        metric, make = ("submission", _mmbench) if task.startswith("mmbench") else ("average", _mmstar)
    if make and metric:
        logs = list(make(lines, summary, metric))
    else:
        metrics = [one for one in dict.fromkeys((*summary.better, *start)) if one not in NO_METRICS]
        logs = [scored(lines, summary, metrics=metrics)]
    for log in logs:
        if all(item["cluster"] == str(item["id"]) for item in log.items):
            log.notes.append(
                "the log names no images: questions are drawn one by one, so the interval may be too narrow"
            )
    yield from logs


def _mme(lines: Lines, summary: Summary, metric: str) -> Iterator[Log]:
    """An item for each question; the two of an image differ in their order."""
    items: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    for where, line in lines:
        value = line.get("mme_perception_score") or line.get("mme_cognition_score")
        value = with_fields(value, ("question_id", "category", "score"), where)
        image = f"{value['category']}/{value['question_id']}"
        seen[image] += 1
        items.append({"id": f"{image}#{seen[image]}", "category": value["category"], "cluster": image})
        items[-1] |= {"score": number(value["score"], f"{where}: score"), "truth": line.get("target")}
    printed = [summary.printed(f"mme_{part}_score") for part in ("perception", "cognition")]
    yield from mme_logs(items, printed, model=summary.model, notes=[PROMPTS])


def _pope(lines: Lines, summary: Summary, metric: str) -> Iterator[Log]:
    """lmms-eval's F1 is over all questions, not the mean of three parts, so there is one category.

    An answer that is neither yes nor no is no positive, and its question is left out of recall.
    """
    items = []
    for where, line in lines:
        value = with_fields(line.get(metric), ("question_id", "score", "prediction", "ground_truth"), where)
        said, true = value["prediction"], value["ground_truth"]
        item = {**item_of(where, line, line, value["score"]), "category": "", "truth": true, "parsed": said}
        items.append({**item, "label": true, "missing": said not in ("yes", "no")})
    yield summary.log(metric, items, "pope", notes=[PROMPTS])


def _mmbench(lines: Lines, summary: Summary, metric: str) -> Iterator[Log]:
    """A group of rotations each, as ``llm2clip score`` reads the answers: lmms-eval logs no judgement of them."""
    groups: dict[int, dict[str, Any]] = {}
    for where, line in lines:
        value = with_fields(line.get(metric), ("index", "prediction", "answer", "category"), where)
        group = int(number(value["index"], f"{where}: index")) % ROTATION
        item = groups.setdefault(group, {"id": group, "score": 1, "cluster": f"group {group}"})
        choices = choices_of({name: str(cell) for name, cell in value.items()})
        item["score"] *= int(letter_of(str(value["prediction"]), choices) == value["answer"])
        if value["index"] == group:
            item |= {"truth": value["answer"], "category": value["category"]}
    items = [item for item in groups.values() if "truth" in item]
    benchmark = "mmbench_cn" if summary.task.startswith("mmbench_cn") else "mmbench"
    printed = summary.printed("gpt_eval_score")
    yield summary.log(metric, items, benchmark, printed=printed and printed / 100, notes=[PROMPTS])


def _pairs(lines: Lines, summary: Summary, metric: str) -> Iterator[Log]:
    """MMVP: two images of a pair, of which both must be right; a lone one does not count."""
    pairs: dict[str, list[dict[str, Any]]] = {}
    for where, line in lines:
        value = with_fields(line.get(metric), ("pair_index", "is_correct"), where)
        pairs.setdefault(str(value["pair_index"]), []).append(value)
    items = [
        {"id": pair, "cluster": f"pair {pair}", "score": int(all(one["is_correct"] for one in both))}
        for pair, both in pairs.items()
        if len(both) == 2
    ]
    yield summary.log(metric, items)


def _mmstar(lines: Lines, summary: Summary, metric: str) -> Iterator[Log]:
    """Each ability (l2_category) has equal weight."""
    items = []
    for where, line in lines:
        value = with_fields(line.get(metric), ("l2_category", "score"), where)
        item = item_of(where, line, value, number(value["score"], f"{where}: score"))
        items.append({**item, "category": value["l2_category"]})
    yield summary.log(metric, items, aggregate=BY_PART)


def _cider(lines: Lines, summary: Summary, metric: str) -> Iterator[Log]:
    values = [with_fields(line.get(metric), ("answer", "pred"), where) for where, line in lines]
    truths = [value["answer"] if isinstance(value["answer"], list) else [value["answer"]] for value in values]
    scores = cider([str(value["pred"]) for value in values], [list(map(str, truth)) for truth in truths])
    items = [
        item_of(where, line, value, score) for (where, line), value, score in zip(lines, values, scores, strict=True)
    ]
    notes = ["CIDEr: document frequencies are those of all references of the log, also in resamples"]
    yield summary.log(metric, items, aggregate="CIDEr", notes=notes)


# what the name of a metric ends in: the logs made of it
COMPOSITES: dict[str, Callable[[Lines, Summary, str], Iterator[Log]]] = {
    "mme_perception_score": _mme,
    "mme_cognition_score": _mme,
    "pope_f1_score": _pope,
    "mmvp_pair_accuracy": _pairs,
    "CIDEr": _cider,
}


def with_fields(value: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    """The object, which must have these fields; ContractError."""
    if not isinstance(value, dict) or any(name not in value for name in names):
        raise ContractError(f"{where}: the metric is {str(value)[:80]}; expected an object with {', '.join(names)}")
    return value


# CIDEr (Vedantam et al. 2015), as pycocoevalcap's CIDEr-D computes it, without its Java: captions are tokenized as the
# Penn Treebank is, in lower case and without punctuation marks

NGRAMS = 4
SIGMA = 6.0  # of the penalty on a difference in length
TOKEN = re.compile(
    r"(?:n't|'(?:s|d|m|re|ve|ll))(?!\w)"  # of don't, it's
    r"|(?:[a-z]\.){2,}|(?<!\w)[a-z]\.(?=\s|$)|(?:mr|mrs|ms|dr|st|vs|jr|sr|co|inc|ltd|etc)\.(?=\s|$)|no\.(?=\s?\d)|[?!]{2,}"
    r"|\d+(?:[.,:/]\d+)*(?:\w|-(?=\w))*|\w+?(?=n't(?!\w))"
    r"|\w(?:\w|[-&/](?=\w)|'(?=\w)(?!(?:s|d|m|re|ve|ll|t)(?!\w)))*|[^\w\s]"
)
DROPPED = frozenset("'`.?!,:;-\"…–—") | {"''", "``", "--", "..."}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
SPLIT = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na")}


def tokens(caption: str) -> Iterator[str]:
    """The words of a caption."""
    for token in map(str, TOKEN.findall(caption.lower().replace("’", "'"))):
        if token not in DROPPED:
            yield from SPLIT.get(token) or [BRACKETS.get(token) or token]


def ngrams(caption: str) -> Counter[tuple[str, ...]]:
    """How often each sequence of one to four words occurs."""
    words = list(tokens(caption))
    return Counter(tuple(words[start : start + n]) for n in range(1, NGRAMS + 1) for start in range(len(words) - n + 1))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The score of each caption against its references; their mean is the corpus' CIDEr (1.1, where papers say 110).

    An n-gram's weight is log(captions / captions with it in a reference), so scores depend on all references, which are
    the benchmark's, but on no other caption.
    """
    all_refs = [[ngrams(one) for one in of_one] for of_one in references]
    frequency = Counter(chain.from_iterable({gram for ref in refs for gram in ref} for refs in all_refs))
    size = math.log(max(1, len(captions)))

    def vector(counts: Counter[tuple[str, ...]]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(NGRAMS)]
        for gram, count in counts.items():
            weights[len(gram) - 1][gram] = count * (size - math.log(max(1, frequency[gram])))
        norms = [math.sqrt(sum(value * value for value in of_n.values())) for of_n in weights]
        return weights, norms, sum(count for gram, count in counts.items() if len(gram) == 2)

    scores = []
    for caption, refs in zip(captions, all_refs, strict=True):
        own, norms, length = vector(ngrams(caption))
        total = 0.0
        for weights, ref_norms, ref_length in map(vector, refs):
            penalty = math.exp(-((length - ref_length) ** 2) / (2 * SIGMA**2))
            for n in range(NGRAMS):
                dot = sum(
                    min(value, weights[n].get(gram, 0.0)) * weights[n].get(gram, 0.0) for gram, value in own[n].items()
                )
                if norms[n] and ref_norms[n]:
                    dot /= norms[n] * ref_norms[n]
                total += dot * penalty
        scores.append(10 * total / NGRAMS / len(refs) if refs else 0.0)
    return scores


READER = Reader(name="lmms-eval", endings=(".jsonl",), fits=fits, read=read)
