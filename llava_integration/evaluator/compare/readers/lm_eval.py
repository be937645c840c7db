"""lm-evaluation-harness and lmms-eval, its fork, both with ``--log_samples``.

The harness writes ``samples_TASK_DATE.jsonl`` next to ``results_DATE.json``, lmms-eval
``DATE_samples_TASK.jsonl`` next to ``DATE_results.json``. There a metric's value is a number, or an
object with what the task's aggregation reads: MME, POPE, MMBench, MMVP, MMStar and captions become
their composites; of other objects the field ``score`` counts, or whether the answer is right.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from llava_integration.evaluator.benchmarks.rules.mmbench import (
    ROTATION,
    choices_of,
    letter_of,
)
from llava_integration.evaluator.compare.readers import (
    BITS,
    BY_PART,
    IMAGES,
    PERPLEXITY,
    Choices,
    Log,
    Reader,
    first_object,
    first_of,
    json_objects,
    mme_logs,
    number,
    short_text,
)
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.json_files import read_json_value

HARNESS = re.compile(
    r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]*\d)\.jsonl(\.gz)?$"
)
LMMS_EVAL = re.compile(r"(?P<date>\d{8}_\d{6})_samples_(?P<task>.+)\.jsonl(\.gz)?$")
# of a line of the harness up to 0.4.2, which wrote an array, without hashes and names of metrics
OLD_HARNESS = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps"}
TEXTS = (
    "arguments",
    "resps",
    "filtered_resps",
    "metrics",
    "doc_hash",
    "prompt_hash",
    "target_hash",
)
CATEGORIES = ("category", "group", "subset", "subdomain", "question_type", "task")
# fields of a line that are no metrics
NO_METRICS = {"doc_id", "token_counts", "doc", "target", "filter", "arguments", *TEXTS}
PROMPTS = "answers to lmms-eval's prompts, which may differ from LLaVA's"
ALONE = "the log names no images: questions are drawn one by one, so the interval may be too narrow"
# what is kept of a line beside its metrics
GROUP = "value of --group"
SHOWN = "what the page shows"
Lines = Sequence[tuple[str, dict[str, Any]]]  # where it is, and a line of the log


def is_log(path: Path, pattern: re.Pattern[str]) -> bool:
    """Recognized by its name, or by a line with a document's hash and, of the harness alone, the
    names of metrics."""
    line = first_object(path)
    hashed = {"doc_id", "doc_hash"} <= set(line) and ("metrics" in line) == (
        pattern is HARNESS
    )
    is_old = pattern is HARNESS and set(line) >= OLD_HARNESS and "doc_hash" not in line
    return bool(pattern.search(path.name)) or hashed or is_old


class Summary:
    """A task in the file of results; without that file, nothing is known."""

    def __init__(
        self, path: Path, pattern: re.Pattern[str], results: str, groups: str = ""
    ):
        """``path``: the task's log; ``groups``: the aggregate of a group's number."""
        name = pattern.search(path.name)
        self.task = name["task"] if name else path.stem.removeprefix("samples_")
        # the harness up to 0.4.2: MODEL_ARGUMENTS_TASK.jsonl next to results.json
        old = path.with_name("results.json")
        is_old = name is None and old.is_file()
        self.path = path.with_name(results.format(name["date"])) if name else path
        if is_old:
            self.path = old
        self.groups = groups
        self.filter = ""  # whose numbers are printed; "": the first
        body = (
            read_json_value(self.path)
            if (name or is_old) and self.path.is_file()
            else {}
        )
        if is_old:
            tasks = [
                task
                for task in body.get("results") or {}
                if path.stem.endswith(f"_{task}")
            ]
            self.task = max(tasks, key=len, default=self.task)
        with errors_about(self.path):
            self.model = str(body.get("model_name", ""))
            # whether more is, by metric
            self.better = (body.get("higher_is_better") or {}).get(self.task) or {}
            self.numbers = body.get("results") or {}
            self.children = body.get("group_subtasks") or {}
            counts = (body.get("n-samples") or {}).get(self.task) or {}
            self.documents = counts.get("original") or 0  # of the task; 0: unknown

    def printed(self, metric: str, of: str = "") -> float | None:
        """The number that was printed of the task, or of a group."""
        numbers = self.numbers.get(of or self.task) or {}
        for key, value in numbers.items():
            name, _, filter_name = key.partition(",")
            is_chosen = self.filter in ("", filter_name) or not filter_name
            if name == metric and is_chosen and isinstance(value, (int, float)):
                return float(value)
        return None

    def size_notes(self, lines: "Lines") -> list[str]:
        """A note if the log has a part of the task's documents."""
        logged = len({str(line["doc_id"]) for _, line in lines})
        if logged >= self.documents:
            return []
        return [
            f"{self.task}: the log has {logged:,} of the task's {self.documents:,} documents; "
            "the number is of these alone"
        ]

    def group(self, metric: str) -> tuple[Any, ...]:
        """What tells the largest group with one number for all its tasks; () if the task is in
        none."""
        tasks = {name: self._leaves(name) for name in self.children}
        groups = [
            name
            for name in tasks
            if self.task in tasks[name] and self.printed(metric, name) is not None
        ]
        largest = max(groups, key=lambda name: len(tasks[name]), default="")
        return (
            (largest, metric, self.printed(metric, largest), self.groups, self.path)
            if largest
            else ()
        )

    def _leaves(self, name: str) -> list[str]:
        below = [one for one in self.children.get(name, ()) if one != name]
        return [leaf for one in below for leaf in self._leaves(one) or [one]]

    def log(
        self,
        metric: str,
        items: list[dict[str, Any]],
        benchmark: str = "",
        **about: Any,
    ) -> Log:
        """The log of a metric."""
        about = {
            "printed": self.printed(metric),
            "group": () if benchmark else self.group(metric),
            **about,
        }
        return Log(
            benchmark=benchmark or f"{self.task} {metric}",
            metrics={},
            items=items,
            model=self.model,
            **about,
        )


def lines_of(path: Path, group: str = "") -> Lines:
    """The lines without what is long and not compared: a million of them lie in memory. ``group``:
    the field of a line or its document whose value is kept as GROUP."""
    lines = []
    for where, line in json_objects(path):
        if "doc_id" not in line:
            raise ContractError(f"{where}: no doc_id")
        if group:
            fields_of_line = {
                **line,
                **(line["doc"] if isinstance(line.get("doc"), dict) else {}),
            }
            if group not in fields_of_line:
                known = ", ".join(fields_of_line)
                raise ContractError(
                    f"{where}: no field {group} for --group; fields: {known}"
                )
            value = fields_of_line[group]
            line[GROUP] = (
                "" if value is None else str(value)
            )  # lines without one are no group
        line[SHOWN] = shown_texts(line)
        for name in TEXTS:
            line.pop(name, None)
        if isinstance(doc := line.get("doc"), dict):
            line["doc"] = {
                name: doc[name] for name in (*IMAGES, *CATEGORIES) if name in doc
            }
        lines.append((where, line))
    return lines


def shown_texts(line: dict[str, Any]) -> dict[str, str]:
    """The question and the answer of a line, those that it has."""
    doc = line.get("doc") if isinstance(line.get("doc"), dict) else {}
    question = first_of(doc or {}, ("question", "query", "problem")) or line.get(
        "input"
    )
    texts = {"question": short_text(question), "answer": short_text(answer_of(line))}
    return {name: text for name, text in texts.items() if text}


def answer_of(line: dict[str, Any]) -> Any:
    """What the model said: a text, or the option that it found most likely."""
    answers = line.get("filtered_resps")
    if isinstance(answers, list) and len(answers) == 1 and isinstance(answers[0], str):
        return answers[0]
    options = line.get("arguments")
    if not isinstance(answers, list) or not isinstance(options, dict):
        return answers
    if len(options) != len(answers):
        return None
    likely = []
    for answer, option in zip(answers, options.values(), strict=True):
        if not isinstance(answer, list) or not isinstance(option, dict):
            return None
        likely.append((float(answer[0]), option.get("arg_1")))
    _, most_likely = max(likely, key=lambda pair: pair[0])
    return most_likely.strip() if isinstance(most_likely, str) else None


def read_harness(path: Path, choices: Choices) -> Iterator[Log]:
    """The task's first metric with a number for each document, under its first filter."""
    summary = Summary(path, HARNESS, "results_{}.json")
    lines = lines_of(path, choices.group)
    filters = list(dict.fromkeys(str(line.get("filter", "none")) for _, line in lines))
    name = choices.filter or filters[0]
    if name not in filters:
        raise ContractError(f"{path} has no filter {name}; it has {', '.join(filters)}")
    chosen = [one for one in lines if str(one[1].get("filter", "none")) == name]
    summary.filter = name
    first_line = first_object(path)
    metrics = first_line.get("metrics") or [
        key for key in first_line if key not in NO_METRICS
    ]
    if choices.metric:
        metrics = [choices.metric]
    log = scored(chosen, summary, metrics)
    if len(filters) > 1:
        log.notes.append(f"filter {name} of {', '.join(filters)}")
    log.notes.extend(summary.size_notes(lines))
    yield log


def read_lmms_eval(path: Path, choices: Choices) -> Iterator[Log]:
    """The task's composite, or its first metric that has a number for each document."""
    summary = Summary(path, LMMS_EVAL, "{}_results.json", groups=BY_PART)
    lines = lines_of(path, choices.group)
    start = first_object(path)
    if choices.metric:
        start = {choices.metric: start.get(choices.metric)}
    if choices.metric and not choices.metric.endswith(tuple(COMPOSITES)):
        logs = [scored(lines, summary, [choices.metric])]
    elif summary.task.startswith("mmbench_"):
        logs = [_mmbench(lines, summary, "submission")]
    elif summary.task.startswith("mmstar"):
        logs = [_mmstar(lines, summary, "average")]
    elif {"mme_perception_score", "mme_cognition_score"} & set(start):
        logs = list(_mme(lines, summary))
    elif found := next(
        (
            (one, make)
            for one in start
            for end, make in COMPOSITES.items()
            if one.endswith(end)
        ),
        None,
    ):
        logs = [found[1](lines, summary, found[0])]
    else:
        metrics = [
            one
            for one in dict.fromkeys((*summary.better, *start))
            if one not in NO_METRICS
        ]
        logs = [scored(lines, summary, metrics)]
    for log in logs:
        if all(item["cluster"] == str(item["id"]) for item in log.items):
            log.notes.append(ALONE)
        log.notes.extend(summary.size_notes(lines))
    yield from logs


def scored(lines: Lines, summary: Summary, metrics: Iterable[str]) -> Log:
    """The log of the first of ``metrics`` with a number, in each line if there is one."""
    where, first_line = lines[0]
    metrics = list(metrics)
    for metric in metrics:
        if metric in LIKELIHOODS and metric in first_line:
            return likelihood_log(lines, summary, metric)
    numeric = [
        metric for metric in metrics if score_of(first_line.get(metric)) is not None
    ]
    if not numeric:
        listed = ", ".join(metrics)
        known = [
            name for name, value in first_line.items() if score_of(value) is not None
        ]
        others = ", ".join(name for name in known if name not in NO_METRICS) or "none"
        problem = (
            f"{where}: none of the metrics {listed} of {summary.task} has a number; "
            f"fields that have: {others}"
        )
        if any(
            score_of(line.get(metric)) is not None
            for _, line in lines
            for metric in metrics
        ):
            raise ContractError(problem)
        return summary.log("", [], unknown=problem)
    # others are of a part
    metric = min(numeric, key=lambda name: sum(name not in line for _, line in lines))
    sign = 1 if summary.better.get(metric, True) else -1
    items = [
        item_of(
            line,
            line.get(metric),
            sign * number(score_of(line.get(metric)), f"{where}: {metric}"),
        )
        for where, line in lines
    ]
    log = summary.log(metric, items)
    if sign == 1:
        return log
    notes = [f"{metric}: lower is better, so its negative is compared"]
    return replace(log, printed=log.printed and -log.printed, group=(), notes=notes)


# metrics of the harness that are made of a text's log-likelihood, or of that and its length
LIKELIHOODS = {
    "perplexity": PERPLEXITY,
    "word_perplexity": PERPLEXITY,
    "byte_perplexity": PERPLEXITY,
    "bits_per_byte": BITS,
}


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
    notes = [f"{metric}: lower is better, so its negative is compared"]
    return replace(log, printed=log.printed and -log.printed, group=(), notes=notes)


def item_of(line: dict[str, Any], value: Any, score: float) -> dict[str, Any]:
    """The item of a line, whose metric has this value."""
    media = line.get("input_media")
    doc = line.get("doc")
    about = {
        **(doc if isinstance(doc, dict) else {}),
        **(value if isinstance(value, dict) and value else line),
    }
    image = (media and media[0]) or first_of(about, IMAGES)
    return {
        "id": line["doc_id"],
        "score": score,
        "cluster": line.get(GROUP) or str(image or line["doc_id"]),
        "category": first_of(about, CATEGORIES),
        "truth": line.get("target"),
        **line.get(SHOWN, {}),
    }


def score_of(value: Any) -> float | bool | None:
    """A metric's number for one document: the value, its ``score``, or whether it is right."""
    if isinstance(value, dict):
        # a list: captions
        if {"pred", "answer"} <= set(value) and not isinstance(value["answer"], list):
            return str(value["pred"]).lower() == str(value["answer"]).lower()
        if {"parsed_pred", "answer"} <= set(value):  # MMMU's
            return any(_mmmu(one, value["answer"]) for one in value["parsed_pred"])
        value = value.get("score", value.get("is_correct"))
    return value if isinstance(value, (int, float)) else None


def _mmmu(answer: Any, truth: Any) -> bool:
    """A letter, or an open question's candidates, texts that contain the truth and numbers that are
    it."""
    if not isinstance(answer, list):
        return answer in truth if isinstance(truth, list) else answer == truth
    for text in (
        one.strip() for one in (truth if isinstance(truth, list) else [truth])
    ):
        try:
            if round(float(text.replace(",", "")), 2) in answer:
                return True
        except ValueError:
            parts = (
                [text.lower()]
                if len(text) > 1
                else [f" {text.lower()}", f"{text.lower()} "]
            )
            if any(
                part in one for part in parts for one in answer if isinstance(one, str)
            ):
                return True
    return False


# lmms-eval's composites


def _mme(lines: Lines, summary: Summary) -> Iterator[Log]:
    """An item for each question; the two of an image differ in their order."""
    items: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    for where, line in lines:
        value = line.get("mme_perception_score") or line.get("mme_cognition_score")
        value = fields(value, "question_id category score", where)
        image = f"{value['category']}/{value['question_id']}"
        seen[image] += 1
        items.append(
            {
                "id": f"{image}#{seen[image]}",
                "category": value["category"],
                "cluster": image,
            }
        )
        items[-1] |= {
            "score": number(value["score"], f"{where}: score"),
            "truth": line.get("target"),
        }
    printed = [
        summary.printed(f"mme_{part}_score") for part in ("perception", "cognition")
    ]
    yield from mme_logs(items, printed, model=summary.model, notes=[PROMPTS])


def _pope(lines: Lines, summary: Summary, metric: str) -> Log:
    """lmms-eval's F1 is over all questions, not the mean of three parts, so there is one category.
    An answer that is neither yes nor no is no positive, and its question is left out of recall."""
    items = []
    for where, line in lines:
        value = fields(line.get(metric), "score prediction ground_truth", where)
        said = value["prediction"]
        true = value["ground_truth"]
        item = {
            **item_of(line, line, value["score"]),
            "category": "",
            "truth": true,
            "parsed": said,
        }
        items.append({**item, "label": true, "missing": said not in ("yes", "no")})
    # parts, not runs
    name = (
        f"{summary.task} F1"
        if summary.task.endswith(("_adv", "_pop", "_random"))
        else "pope"
    )
    return summary.log(metric, items, name, aggregate="pope", notes=[PROMPTS])


def _mmbench(lines: Lines, summary: Summary, metric: str) -> Log:
    """A group of rotations each, as ``llm2clip score`` reads the answers: lmms-eval logs no
    judgement of them."""
    groups: dict[int, dict[str, Any]] = {}
    for where, line in lines:
        value = fields(line.get(metric), "index prediction answer category", where)
        group = int(number(value["index"], f"{where}: index")) % ROTATION
        item = groups.setdefault(
            group, {"id": group, "score": 1, "cluster": f"group {group}"}
        )
        choices = choices_of({name: str(cell) for name, cell in value.items()})
        item["score"] *= int(
            letter_of(str(value["prediction"]), choices) == value["answer"]
        )
        if value["index"] == group and choices and value["answer"] in tuple("ABCDE"):
            item |= {"truth": value["answer"], "category": value["category"]}
    if not (items := [item for item in groups.values() if "truth" in item]):
        return summary.log(
            "",
            [],
            unknown=f"{lines[0][0]}: {summary.task} has no options, or answers of its server's",
        )
    task = summary.task.removesuffix(
        "_static"
    )  # others, as mmbench_en_dev_lite, are not its runs
    name = {"mmbench_en_dev": "mmbench", "mmbench_cn_dev": "mmbench_cn"}.get(
        task, f"{task} circular"
    )
    printed = summary.printed("gpt_eval_score")
    return summary.log(
        metric, items, name, printed=printed and printed / 100, notes=[PROMPTS]
    )


def _pairs(lines: Lines, summary: Summary, metric: str) -> Log:
    """MMVP: two images of a pair, of which both must be right; a lone one does not count."""
    pairs: dict[str, list[bool]] = {}
    for where, line in lines:
        value = fields(line.get(metric), "pair_index is_correct", where)
        pairs.setdefault(str(value["pair_index"]), []).append(value["is_correct"])
    complete = {pair: int(all(both)) for pair, both in pairs.items() if len(both) == 2}
    items = [
        {"id": pair, "cluster": f"pair {pair}", "score": score}
        for pair, score in complete.items()
    ]
    return summary.log(metric, items)


def _mmstar(lines: Lines, summary: Summary, metric: str) -> Log:
    """Each ability (l2_category) has equal weight."""
    items = []
    for where, line in lines:
        value = fields(line.get(metric), "l2_category score", where)
        score = number(value["score"], f"{where}: score")
        items.append(item_of(line, value, score) | {"category": value["l2_category"]})
    return summary.log(metric, items, aggregate=BY_PART)


def _cider(lines: Lines, summary: Summary, metric: str) -> Log:
    values = [fields(line.get(metric), "answer pred", where) for where, line in lines]
    truths = [
        value["answer"] if isinstance(value["answer"], list) else [value["answer"]]
        for value in values
    ]
    scores = cider(
        [str(value["pred"]) for value in values],
        [list(map(str, truth)) for truth in truths],
    )
    items = [
        item_of(line, value, score)
        for (_, line), value, score in zip(lines, values, scores, strict=True)
    ]
    notes = [
        "CIDEr: document frequencies are those of all references of the log, also in resamples"
    ]
    return summary.log(metric, items, aggregate="CIDEr", notes=notes)


# what the name of a metric ends in: the log made of it
COMPOSITES = {"pope_f1_score": _pope, "mmvp_pair_accuracy": _pairs, "CIDEr": _cider}


def fields(value: Any, names: str, where: str) -> dict[str, Any]:
    """The object that a metric's value is; ContractError if it lacks one of these fields."""
    if not isinstance(value, dict) or not set(names.split()) <= set(value):
        raise ContractError(
            f"{where}: the metric is {str(value)[:80]}; expected an object with {names}"
        )
    return value


# CIDEr (Vedantam et al. 2015), as pycocoevalcap's CIDEr-D computes it, without its Java: captions
# are tokenized as the Penn Treebank is, in lower case and without punctuation marks.

NGRAMS = 4
SIGMA = 6.0  # of the penalty on a difference in length
TOKEN = re.compile(
    r"(?:n't|'(?:s|d|m|re|ve|ll))(?!\w)"  # of don't, it's
    r"|(?:[a-z]\.){2,}|(?<!\w)[a-z]\.(?=\s|$)|(?:mr|mrs|ms|dr|st|vs|jr|sr|co|inc|ltd|etc)\.(?=\s|$)|no\.(?=\s?\d)|[?!]{2,}"
    r"|\d+(?:[.,:/]\d+)*(?:\w|-(?=\w))*|\w+?(?=n't(?!\w))"
    r"|\w(?:\w|[-&/](?=\w)|'(?=\w)(?!(?:s|d|m|re|ve|ll|t)(?!\w)))*|[^\w\s]"
)
DROPPED = frozenset("'`.?!,:;-\"…–—") | {"''", "``", "--", "..."}
BRACKETS = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
}
SPLIT = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
}


def tokens(caption: str) -> Iterator[str]:
    """The words of a caption."""
    for token in map(str, TOKEN.findall(caption.lower().replace("’", "'"))):
        if token not in DROPPED:
            yield from SPLIT.get(token) or [BRACKETS.get(token) or token]


def ngrams(caption: str) -> Counter[tuple[str, ...]]:
    """How often each sequence of one to four words occurs."""
    words = list(tokens(caption))
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, NGRAMS + 1)
        for start in range(len(words) - n + 1)
    )


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The score of each caption against its references; their mean is the corpus' CIDEr (1.1, where
    papers say 110).

    An n-gram's weight is log(captions / captions with it in a reference): scores depend on the
    benchmark's references.
    """
    all_refs = [list(map(ngrams, texts)) for texts in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for refs in all_refs:
        frequency.update(set(chain.from_iterable(refs)))
    size = math.log(max(1, len(captions)))

    def vector(
        counts: Counter[tuple[str, ...]],
    ) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(NGRAMS)]
        for gram, count in counts.items():
            weights[len(gram) - 1][gram] = count * (
                size - math.log(max(1, frequency[gram]))
            )
        norms = [math.hypot(*of_n.values()) for of_n in weights]
        return (
            weights,
            norms,
            sum(count for gram, count in counts.items() if len(gram) == 2),
        )

    def likeness(caption: str, refs: Sequence[Counter[tuple[str, ...]]]) -> float:
        own, norms, length = vector(ngrams(caption))
        total = 0.0
        for weights, ref_norms, ref_length in map(vector, refs):
            penalty = math.exp(-((length - ref_length) ** 2) / (2 * SIGMA**2))
            for mine, theirs, norm, ref_norm in zip(
                own, weights, norms, ref_norms, strict=True
            ):
                dot = sum(
                    min(value, theirs[gram]) * theirs[gram]
                    for gram, value in mine.items()
                    if gram in theirs
                )
                total += dot / (norm * ref_norm or 1) * penalty
        return 10 * total / NGRAMS / max(1, len(refs))

    return [
        likeness(caption, refs)
        for caption, refs in zip(captions, all_refs, strict=True)
    ]


READER = [
    Reader(
        name="lm-evaluation-harness",
        endings=(".jsonl", ".jsonl.gz"),
        fits=partial(is_log, pattern=HARNESS),
        read=read_harness,
        choices=("group", "metric", "filter"),
    ),
    Reader(
        name="lmms-eval",
        endings=(".jsonl", ".jsonl.gz"),
        fits=partial(is_log, pattern=LMMS_EVAL),
        read=read_lmms_eval,
        choices=("group", "metric"),
    ),
]
