"""The score of a document in a log of lm-evaluation-harness or lmms-eval: the first metric that has
a number for each, or one from which the printed number can be rebuilt."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from llava_integration.evaluator.compare.readers import BITS, PERPLEXITY, Log, number
from llava_integration.evaluator.compare.readers.harness_lines import (
    NO_METRICS,
    Lines,
    Summary,
    item_of,
)
from llm2clip_plugin.errors import ContractError

# metrics of the harness that are made of a text's log-likelihood, or of that and its length
LIKELIHOODS = {
    "perplexity": PERPLEXITY,
    "word_perplexity": PERPLEXITY,
    "byte_perplexity": PERPLEXITY,
    "bits_per_byte": BITS,
}


def scored(lines: Lines, summary: Summary, metrics: Iterable[str]) -> Log:
    """The log of the first of ``metrics`` with a number, in each line if there is one."""
    _, first_line = lines[0]
    metrics = list(metrics)
    for metric in metrics:
        if metric in LIKELIHOODS and metric in first_line:
            return likelihood_log(lines, summary, metric)
    numeric = []
    for metric in metrics:
        if score_of(first_line.get(metric)) is not None:
            numeric.append(metric)
    if not numeric:
        return without_number(lines, summary, metrics)
    # others are of a part
    times = Counter(name for _, line in lines for name in line)
    metric = max(numeric, key=lambda name: times[name])
    sign = 1 if summary.better.get(metric, True) else -1
    items = []
    for where, line in lines:
        value = line.get(metric)
        score = number(score_of(value), f"{where}: {metric}")
        items.append(item_of(line, value, sign * score))
    log = summary.log(metric, items)
    return log if sign == 1 else negated(log, metric)


def negated(log: Log, metric: str) -> Log:
    """The log of a metric of which less is better, whose scores are its negatives."""
    notes = [f"{metric}: lower is better, so its negative is compared"]
    return replace(log, printed=log.printed and -log.printed, group=(), notes=notes)


def without_number(lines: Lines, summary: Summary, metrics: Sequence[str]) -> Log:
    """A log that says why none of the metrics is compared. ContractError if some line has one."""
    where, first_line = lines[0]
    others = []
    for name, value in first_line.items():
        if score_of(value) is not None and name not in NO_METRICS:
            others.append(name)
    problem = (
        f"{where}: none of the metrics {', '.join(metrics)} of {summary.task} has a number; "
        f"fields that have: {', '.join(others) or 'none'}"
    )
    for _, line in lines:
        for metric in metrics:
            if score_of(line.get(metric)) is not None:
                raise ContractError(problem)
    return summary.log("", [], unknown=problem)


def likelihood_log(lines: Lines, summary: Summary, metric: str) -> Log:
    """The log of a metric of which a line has the log-likelihood, more of which is better."""
    items = []
    for where, line in lines:
        value = line.get(metric)
        pair = value if isinstance(value, list) else [value, 1]
        if len(pair) != 2:
            raise ContractError(
                f"{where}: {metric} is {value!r}; expected [log-likelihood, length]"
            )
        likelihood, length = (number(part, f"{where}: {metric}") for part in pair)
        if length <= 0:
            raise ContractError(f"{where}: {metric} has the length {length:g}")
        item = item_of(line, line, likelihood / length)
        items.append({**item, "loglikelihood": likelihood, "length": length})
    log = summary.log(metric, items, aggregate=LIKELIHOODS[metric])
    return negated(log, metric)


def score_of(value: Any) -> float | bool | None:
    """A metric's number for one document: the value, its ``score``, or whether it is right."""
    if isinstance(value, dict):
        # a list: captions
        if {"pred", "answer"} <= set(value) and not isinstance(value["answer"], list):
            return str(value["pred"]).lower() == str(value["answer"]).lower()
        if {"parsed_pred", "answer"} <= set(value):  # MMMU's
            answers = value["parsed_pred"]
            return any(is_right_in_mmmu(answer, value["answer"]) for answer in answers)
        value = value.get("score", value.get("is_correct"))
    return value if isinstance(value, (int, float)) else None


def is_right_in_mmmu(answer: Any, truth: Any) -> bool:
    """Whether a letter is the truth, or one of an open question's candidates, which are texts that
    contain it and numbers that are it."""
    if not isinstance(answer, list):
        return answer in truth if isinstance(truth, list) else answer == truth
    truths = truth if isinstance(truth, list) else [truth]
    return any(contains_truth(answer, text.strip()) for text in truths)


def contains_truth(candidates: Sequence[Any], truth: str) -> bool:
    """Whether a candidate is the number ``truth``, or a text that contains it."""
    try:
        return round(float(truth.replace(",", "")), 2) in candidates
    except ValueError:
        pass
    truth = truth.lower()
    # a lone letter must begin or end a word
    parts = [truth] if len(truth) > 1 else [f" {truth}", f"{truth} "]
    for candidate in candidates:
        if isinstance(candidate, str) and any(part in candidate for part in parts):
            return True
    return False
