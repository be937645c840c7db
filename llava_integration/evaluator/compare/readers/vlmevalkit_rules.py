"""VLMEvalKit's rules for answers that need no judge, for folders whose tables have no scores: older
versions wrote the number alone.
"""

import ast
from collections.abc import Callable, Sequence

from llava_integration.evaluator.benchmarks.rules.vqa import (
    leave_one_out,
    one_line,
    vqa_api,
)

ANLS_THRESHOLD = 0.5  # a nearness below is none
RELATIVE_ERROR = 0.05  # that a number of ChartQA may have
FORMULAS = "Handwritten Mathematical Expression Recognition"  # OCRBench's category
# (answer, truths, category) -> score
Rule = Callable[[str, Sequence[str], str], float]


def rule_of(data: str) -> Rule | None:
    """The rule of a benchmark; None if its answers need a judge."""
    if data.startswith("OCRBench_v2"):
        return None
    for name, rule in RULES.items():
        if data.startswith(name):
            return rule
    return None


def truths_of(cell: object) -> list[str]:
    """The right answers in a cell: one, or a list as Python prints it."""
    text = str(cell)
    if text.startswith("[") and text.endswith("]"):
        try:
            return [str(answer) for answer in ast.literal_eval(text)]
        except (SyntaxError, ValueError):
            pass
    return [text]


def contains_truth(answer: str, truths: Sequence[str], category: str) -> float:
    """OCRBench: whether an answer contains a right one; spaces don't count in formulas."""
    answer = one_line(answer)
    for truth in truths:
        truth = one_line(truth)
        if category == FORMULAS:
            is_right = truth.replace(" ", "") in answer.replace(" ", "")
        else:
            is_right = truth.lower() in answer.lower()
        if is_right:
            return 1.0
    return 0.0


def human_agreement(answer: str, truths: Sequence[str], _: str) -> float:
    """TextVQA: the VQA accuracy."""
    humans = [vqa_api(one_line(truth)) for truth in truths]
    return leave_one_out(vqa_api(one_line(answer)), humans)


def relaxed(answer: str, truths: Sequence[str], _: str) -> float:
    """ChartQA: a number may be 5 % off, a text must be equal but for case."""
    return float(any(is_close(answer.strip(), truth) for truth in truths))


def is_close(answer: str, truth: str) -> bool:
    """Whether an answer is right for ChartQA."""
    said = number_of(answer)
    true = number_of(truth)
    if said is None or not true:
        return answer.lower() == truth.lower()
    return abs(said - true) / abs(true) <= RELATIVE_ERROR


def number_of(text: str) -> float | None:
    """A text as a number, also a percentage; None if it is none."""
    try:
        if text.endswith("%"):
            return float(text.rstrip("%")) / 100
        return float(text)
    except ValueError:
        return None


def equal(answer: str, truths: Sequence[str], _: str) -> float:
    """GQA and OCR-VQA: equal but for case."""
    plain = answer.strip().lower()
    return float(any(plain == truth.strip().lower() for truth in truths))


def anls(answer: str, truths: Sequence[str], _: str) -> float:
    """DocVQA and InfoVQA: how near an answer is to the nearest right one, 0 below one half."""
    distances = [relative_distance(truth, answer) for truth in truths]
    return nearness(min(distances))


def nearness(distance: float) -> float:
    """The score of a relative distance."""
    return 1 - distance if distance <= 1 - ANLS_THRESHOLD else 0.0


def relative_distance(truth: str, answer: str) -> float:
    """Edits from one text to the other, of the longer one's length."""
    longest = max(len(truth), len(answer))
    if longest == 0:
        return 0.0
    plain_truth = " ".join(truth.lower().split())
    plain_answer = " ".join(answer.lower().split())
    return edits(plain_truth, plain_answer) / longest


def edits(one: str, other: str) -> int:
    """The Levenshtein distance."""
    distances = list(range(len(one) + 1))
    for row, letter in enumerate(other, 1):
        above = distances
        distances = [row]
        for column, candidate in enumerate(one, 1):
            if candidate == letter:
                distances.append(above[column - 1])
            else:
                nearest = min(above[column - 1], above[column], distances[-1])
                distances.append(1 + nearest)
    return distances[-1]


RULES: dict[str, Rule] = {
    "OCRBench": contains_truth,
    "TextVQA": human_agreement,
    "ChartQA": relaxed,
    "OCRVQA": equal,
    "GQA": equal,
    "DocVQA": anls,
    "InfoVQA": anls,
}
