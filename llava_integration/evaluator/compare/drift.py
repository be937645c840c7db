"""Two runs of one model: where they differ, did the prompt, the answer or the scoring change?

Decided question by question, from what logs hold of it: the prompt (or its hash), the text that the
model generated, the answer that was extracted from it, the expected answer, and the score. The
first change that can explain another score is its cause: an answer that is the same in spite of
another prompt cannot have another score because of the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_integration.evaluator.benchmarks.benchmark import Item
from llava_integration.evaluator.compare.pairing import (
    benchmarks_in_common,
    one_sided_notes,
)
from llava_integration.evaluator.compare.readers import LONGEST_TEXT
from llava_integration.evaluator.compare.sides import Run, Side, model_of
from llm2clip_plugin.errors import ContractError

PROMPT = "another prompt"
TRUTH = "another expected answer"
ANSWER = "same prompt, another answer"
ANSWER_OF_QUESTION = "same question, another answer; the logs hold no whole prompt"
ANSWER_ALONE = "another answer; the logs hold no prompt, or only its beginning"
EXTRACTION = "same text, another answer extracted"
SCORING = "same answer, scored in another way"
UNKNOWN = "the logs hold no answer, or only a part of it"
MISSING = "in one log only"
CAUSES = (
    PROMPT,
    TRUTH,
    ANSWER,
    ANSWER_OF_QUESTION,
    ANSWER_ALONE,
    EXTRACTION,
    SCORING,
    UNKNOWN,
)
# fields of an item that stand for a text too long to keep
PROMPT_HASH = "prompt_hash"
RESPONSE_HASH = "response_hash"
REPEATS = "repeats"  # how many answers the score of an item is the mean of


@dataclass(frozen=True, kw_only=True)
class Change:
    """The questions whose score differs for one cause."""

    cause: str
    ids: tuple[str, ...]
    better: int
    worse: int
    # what they add to the difference of the mean scores, in the benchmark's unit
    points: float


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What changed between two runs on one benchmark."""

    benchmark: str
    title: str
    unit: str
    base: float  # mean score of all questions that the log has, in the benchmark's unit
    new: float
    questions: int  # in both logs
    only: tuple[int, int]  # questions that base alone has, and new
    changes: tuple[Change, ...]  # in the order of CAUSES, then MISSING
    # questions with the same score in spite of another prompt, and of another answer
    same_score: tuple[int, int]
    # questions whose prompt another question of base has: they are numbered otherwise
    renumbered: int
    settings: tuple[str, ...]  # what differs in how the logs say they were made

    @property
    def differing(self) -> int:
        """Questions in both logs with another score."""
        return sum(
            len(change.ids) for change in self.changes if change.cause != MISSING
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "changes": [vars(change) for change in self.changes]}


def drift(base: Side, new: Side) -> tuple[list[Drift], list[str]]:
    """What changed on every benchmark that both runs have, and notes on what is left out. Raises
    ContractError if no benchmark can be compared, as with several runs on a side."""
    shared = benchmarks_in_common(base, new)
    notes = different_models(base, new)
    for side in (base, new):
        notes += [f"{side.name}: {note}" for note in side.notes]
    notes += one_sided_notes(base, new)
    drifts = []
    problems = []
    for name in shared:
        try:
            drifts.append(drift_of(name, only_run(base, name), only_run(new, name)))
        except ContractError as error:
            problems.append(error)
    if not drifts:
        raise problems[0]
    notes += [f"left out: {problem}" for problem in problems]
    return drifts, notes


def only_run(side: Side, name: str) -> Run:
    """A side's run on a benchmark. Raises ContractError for several."""
    run, *others = side.runs[name]
    if others:
        raise ContractError(
            f"{side.name} has {1 + len(others)} runs of {name}; --drift compares one run with one, "
            "so name their files"
        )
    return run


def different_models(base: Side, new: Side) -> list[str]:
    """A note if the logs name two models: then another answer need not mean a change."""
    names = [", ".join(models_of(side)) for side in (base, new)]
    if "" in names or names[0] == names[1]:
        return []
    return [
        f"the sides are different models, {base.name}: {names[0]}, {new.name}: {names[1]}; what "
        "differs may be the models', and not a change of the evaluation"
    ]


def models_of(side: Side) -> list[str]:
    """The models that a side's logs name, without the numbers of seeds."""
    models = set()
    for runs in side.runs.values():
        models.update(model_of(run) for run in runs)
    return sorted(models - {""})


def drift_of(name: str, base: Run, new: Run) -> Drift:
    """What changed on one benchmark."""
    base_items = dict(zip(base.ids, base.items, strict=True))
    new_items = dict(zip(new.ids, new.items, strict=True))
    shared = [identifier for identifier in base.ids if identifier in new_items]
    if not shared:
        raise ContractError(f"{name}: the two logs have no question in common")
    scale = base.scale if base.unit == new.unit else 1.0
    base_mean = scale * mean_score(base)
    new_mean = scale * mean_score(new)
    ids_of: dict[str, list[str]] = {cause: [] for cause in CAUSES}
    other_prompt = 0
    other_answer = 0
    for identifier in shared:
        old = base_items[identifier]
        now = new_items[identifier]
        if old["score"] != now["score"]:
            ids_of[cause_of(old, now)].append(identifier)
            continue
        other_prompt += has_other_prompt(old, now)
        other_answer += has_same_answer(old, now) is False
    changes = []
    for cause, ids in ids_of.items():
        if ids:
            changes.append(
                change_of(cause, ids, base_items, new_items, scale / len(shared))
            )
    only_base = len(base.ids) - len(shared)
    only_new = len(new.ids) - len(shared)
    if only_base or only_new:
        explained = sum(change.points for change in changes)
        rest = new_mean - base_mean - explained
        changes.append(Change(cause=MISSING, ids=(), better=0, worse=0, points=rest))
    return Drift(
        benchmark=name,
        title=base.title,
        unit=base.unit if base.unit == new.unit else "score",
        base=base_mean,
        new=new_mean,
        questions=len(shared),
        only=(only_base, only_new),
        changes=tuple(changes),
        same_score=(other_prompt, other_answer),
        renumbered=renumbered(shared, base_items, new_items),
        settings=tuple(changed_settings(base.provenance, new.provenance)),
    )


def mean_score(run: Run) -> float:
    """The mean score over all of a run's questions."""
    return sum(run.scores) / len(run.scores)


def change_of(
    cause: str,
    ids: Sequence[str],
    base_items: dict[str, Item],
    new_items: dict[str, Item],
    scale: float,
) -> Change:
    """The change of these questions; ``scale``: what one question with the score 1 adds."""
    gains = []
    for identifier in ids:
        gains.append(new_items[identifier]["score"] - base_items[identifier]["score"])
    return Change(
        cause=cause,
        ids=tuple(ids),
        better=sum(gain > 0 for gain in gains),
        worse=sum(gain < 0 for gain in gains),
        points=scale * float(sum(gains)),
    )


def cause_of(base: Item, new: Item) -> str:
    """Why a question has another score."""
    truth_differs = differs(base.get("truth"), new.get("truth"))
    same_answer = has_same_answer(base, new)
    if same_answer:
        return TRUTH if truth_differs else SCORING
    response = base.get(RESPONSE_HASH)
    if same_answer is False and response and response == new.get(RESPONSE_HASH):
        return EXTRACTION
    if has_other_prompt(base, new):
        return PROMPT
    if truth_differs:
        return TRUTH
    if same_answer is None:
        return UNKNOWN
    if base.get(PROMPT_HASH) and new.get(PROMPT_HASH):
        return ANSWER
    return ANSWER_OF_QUESTION if has_same_question(base, new) else ANSWER_ALONE


def has_same_answer(base: Item, new: Item) -> bool | None:
    """Whether the answers that were scored are the same; None if that is not known: items keep the
    first LONGEST_TEXT characters of the first of several answers."""
    if base.get("answer") is None or new.get("answer") is None:
        return None
    answer = str(base["answer"])
    if answer != str(new["answer"]):
        return False
    is_one = max(base.get(REPEATS, 1), new.get(REPEATS, 1)) == 1
    if is_one and len(answer) < LONGEST_TEXT:
        return True
    if not base.get(RESPONSE_HASH) or not new.get(RESPONSE_HASH):
        return None
    return base[RESPONSE_HASH] == new[RESPONSE_HASH]


def has_other_prompt(base: Item, new: Item) -> bool:
    """Whether the prompts are known to differ: by their hashes, or, if a log has none, by the
    question or its options."""
    if base.get(PROMPT_HASH) and new.get(PROMPT_HASH):
        return base[PROMPT_HASH] != new[PROMPT_HASH]
    for name in ("question", "choices"):
        if base.get(name) and new.get(name) and differs(base[name], new[name]):
            return True
    return False


def has_same_question(base: Item, new: Item) -> bool:
    """Whether both logs have the question, which is the same. The prompt around it, such as
    instructions and examples, may differ."""
    question = str(base.get("question") or "")
    is_whole = 0 < len(question) < LONGEST_TEXT
    return is_whole and question == str(new.get("question") or "")


def prompt_of(item: Item) -> Any:
    """What tells a question's prompt from others; None if the log has none."""
    if item.get(PROMPT_HASH):
        return item[PROMPT_HASH]
    if not item.get("question"):
        return None
    return (item["question"], tuple(map(str, item.get("choices") or ())))


def differs(base: Any, new: Any) -> bool:
    """Whether two values are known and differ. A number is the same as its text: versions of an
    evaluator write either."""
    return base is not None and new is not None and str(base) != str(new)


def renumbered(
    ids: Sequence[str], base_items: dict[str, Item], new_items: dict[str, Item]
) -> int:
    """How many questions of new have the prompt of another question of base."""
    id_of_prompt = {}
    for identifier, item in base_items.items():
        if prompt_of(item) is not None:
            id_of_prompt.setdefault(prompt_of(item), identifier)
    count = 0
    for identifier in ids:
        if has_other_prompt(base_items[identifier], new_items[identifier]):
            count += prompt_of(new_items[identifier]) in id_of_prompt
    return count


# of a score file's provenance: what a digest of data or a path says is no setting
NO_SETTINGS = ("answers", "answers_sha256", "data", "command")


def changed_settings(
    base: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> list[str]:
    """How the records of two logs differ, one line a setting."""
    lines = []
    for name in sorted({*base, *new} - set(NO_SETTINGS)):
        old = base.get(name)
        now = new.get(name)
        if isinstance(old, dict) and isinstance(now, dict):
            lines += changed_settings(old, now, f"{prefix}{name}.")
        elif old != now:
            lines.append(f"{prefix}{name}: {old!r} -> {now!r}")
    return lines
