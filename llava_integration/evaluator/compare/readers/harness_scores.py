"""The score of a document in a log of lm-evaluation-harness or lmms-eval: the first metric that has
a number for each, or one from which the printed number can be rebuilt."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from llava_integration.evaluator.compare.readers import (
    BITS,
    LABELS_F1,
    LABELS_MCC,
    PERPLEXITY,
    Log,
    negated,
    number,
)
from llava_integration.evaluator.compare.readers.harness_lines import (
    NO_METRICS,
    Lines,
    item_of,
)
from llava_integration.evaluator.compare.readers.harness_results import (
    Summary,
)
from llm2clip_plugin.errors import ContractError

# metrics of the harness that are made of a text's log-likelihood, or of that and its length
LIKELIHOODS = {
    "perplexity": PERPLEXITY,
    "word_perplexity": PERPLEXITY,
    "byte_perplexity": PERPLEXITY,
    "bits_per_byte": BITS,
}
# metrics of the harness that are made of pairs of a label and a prediction
PAIRS = {"f1": LABELS_F1, "mcc": LABELS_MCC}
BRIER = "brier_score"  # made of a label and the probabilities of all


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
        return scored_pairs(lines, summary, metrics) or without_number(
            lines, summary, metrics
        )
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
        item.pop("answer", None)  # there is none: the text was given
        items.append({**item, "loglikelihood": likelihood, "length": length})
    log = summary.log(metric, items, aggregate=LIKELIHOODS[metric])
    return negated(log, metric)


def scored_pairs(lines: Lines, summary: Summary, metrics: Sequence[str]) -> Log | None:
    """The log of the first metric whose value is a label and a prediction; None if none is."""
    _, first_line = lines[0]
    for metric in metrics:
        value = first_line.get(metric)
        is_pair = isinstance(value, list) and len(value) == 2
        if is_pair and metric in PAIRS:
            return label_log(lines, summary, metric)
        if is_pair and metric == BRIER:
            return brier_log(lines, summary)
    return None


def label_log(lines: Lines, summary: Summary, metric: str) -> Log:
    """The log of F1 or Matthews' correlation, both of the whole task."""
    items = []
    for where, line in lines:
        truth, answer = pair_of(line, metric, where)
        item = item_of(line, line, int(truth == answer))
        items.append({**item, "label": truth, "parsed": answer})
    return summary.log(metric, items, aggregate=PAIRS[metric])


def brier_log(lines: Lines, summary: Summary) -> Log:
    """The log of the Brier score: the squared distance of the probabilities from the truth."""
    items = []
    for where, line in lines:
        truth, probabilities = pair_of(line, BRIER, where)
        if isinstance(probabilities, str):  # an array as numpy prints it
            probabilities = probabilities.strip("[]").split()
        distance = 0.0
        for label, probability in enumerate(probabilities):
            distance += (float(probability) - int(label == truth)) ** 2
        items.append(item_of(line, line, -distance))
    return negated(summary.log(BRIER, items), BRIER)


def pair_of(line: dict[str, Any], metric: str, where: str) -> list[Any]:
    """A metric's value that is a pair."""
    value = line.get(metric)
    if not isinstance(value, list) or len(value) != 2:
        raise ContractError(
            f"{where}: {metric} is {value!r}; expected a label and a prediction"
        )
    return value


# fields of a metric's object that are a document's score; tasks of lmms-eval call it differently
SCORE_FIELDS = ("score", "is_correct", "true_false", "gpt_score", "correct", "hit")


def score_of(value: Any) -> float | bool | None:
    """A metric's number for one document: the value, its ``score``, or whether it is right."""
    if not isinstance(value, dict):
        return value if isinstance(value, (int, float)) else None
    for name in SCORE_FIELDS:
        if isinstance(value.get(name), (int, float)):
            return value[name]
    truth = value.get("answer")
    if "parsed_pred" in value and "answer" in value:  # MMMU's
        return any(is_right_in_mmmu(answer, truth) for answer in value["parsed_pred"])
    # a list: captions; a box is no text
    if not isinstance(truth, (str, int, float)) or "bbox" in value:
        return None
    for name in ("pred", "pred_answer"):
        if name in value:
            return str(value[name]).lower() == str(truth).lower()
    return None


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
