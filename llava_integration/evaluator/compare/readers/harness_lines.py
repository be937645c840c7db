"""What the logs of lm-evaluation-harness and of lmms-eval, its fork, have in common: a line for
each document, in which a metric's value is a number or an object."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from llava_integration.evaluator.compare.readers import (
    IMAGES,
    digest_of,
    first_of,
    short_text,
)
from llava_integration.evaluator.compare.readers.lettered_options import (
    lettered_options,
)
from llm2clip_plugin.errors import ContractError

# names of logs: the harness's, since 0.4.3, and lmms-eval's, since 0.2.3
HARNESS_NAME = re.compile(
    r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]*\d)\.jsonl?(\.gz)?$"
)
LMMS_NAME = re.compile(r"(?P<date>\d{8}_\d{6})_samples_(?P<task>.+)\.jsonl(\.gz)?$")
# of a line of the harness up to 0.4.2, which has no hash
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
# POPE's image; elsewhere such a field may be the name of a data set
POPE_IMAGE = "image_source"
# fields of a line that are no metrics
NO_METRICS = {"doc_id", "token_counts", "doc", "target", "filter", "arguments", *TEXTS}
NO_DOCUMENTS = "is empty: it has no documents; was the run cut off?"
ALONE = "the log names no images: questions are drawn one by one, so the interval may be too narrow"
# what is kept of a line in addition to its metrics
GROUP = "value of --group"
SHOWN = "what the page shows"
Lines = Sequence[tuple[str, dict[str, Any]]]  # where it is, and a line of the log


def is_harness_line(line: dict[str, Any]) -> bool:
    """Whether lm-evaluation-harness wrote a line, not lmms-eval: it has the names of metrics, which
    0.4.3 left out, or arguments with names."""
    if "doc_hash" not in line:
        return set(line) >= OLD_HARNESS
    return "metrics" in line or has_names(line.get("arguments"))


def lines_of(objects: Iterable[tuple[str, dict[str, Any]]], group: str = "") -> Lines:
    """A log's lines without what is long and not compared: a million of them lie in memory.
    ``group``: the field of a line or its document whose value is kept as GROUP."""
    lines = []
    for where, line in objects:
        if "doc_id" not in line:
            raise ContractError(f"{where}: no doc_id")
        doc = line.get("doc")
        if group:
            line[GROUP] = group_of(line, group, where)
        line[SHOWN] = shown_texts(line)
        for name in TEXTS:
            line.pop(name, None)
        if isinstance(doc, dict):
            kept = (*IMAGES, *CATEGORIES, POPE_IMAGE)
            line["doc"] = {name: doc[name] for name in kept if name in doc}
        lines.append((where, line))
    return lines


def group_of(line: dict[str, Any], field: str, where: str) -> str:
    """The value of a field of a line or its document; "" for none, which is no group."""
    doc = line.get("doc")
    values = {**line, **doc} if isinstance(doc, dict) else line
    if field not in values:
        raise ContractError(
            f"{where}: no field {field} for --group; fields: {', '.join(values)}"
        )
    value = values[field]
    return "" if value is None else str(value)


def shown_texts(line: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a line: question, options, truth and answer, those that it has."""
    doc = line.get("doc")
    question: Any = ""
    if isinstance(doc, dict):
        question = first_of(doc, ("question", "query", "problem"))
    question = question or line.get("input") or prompt_of(line.get("arguments"))
    texts: dict[str, Any] = {}
    if short_text(question):
        texts["question"] = short_text(question)
    answer = answer_of(line)
    if isinstance(answer, str):  # one that is empty is an answer, too
        texts["answer"] = short_text(answer)
    options = options_of(line.get("arguments"))
    if len(set(options)) < 2:
        prompt = line.get("input") or prompt_of(line.get("arguments")) or question
        in_prompt = lettered_options(prompt, line.get("target"))
        if in_prompt:
            texts["choices"] = [short_text(option) for option in in_prompt]
    else:
        texts["choices"] = [short_text(option).strip() for option in options]
        truth = line.get("target")
        if isinstance(truth, int) and 0 <= truth < len(options):
            texts["truth"] = texts["choices"][truth]
    texts.update(hashes_of(line))
    return texts


def hashes_of(line: dict[str, Any]) -> dict[str, str]:
    """What tells a line's prompt, and all that the model said, from others: they are too long to
    keep."""
    prompts = []
    for request in pairs_of(line.get("arguments")):
        # the prompt, and an option whose likelihood is asked; no settings of generation
        prompts.append([text for text in request if isinstance(text, str)])
    hashes = {}
    prompt = prompts or line.get("prompt_hash") or line.get("input")
    if prompt:
        hashes["prompt_hash"] = digest_of(prompt)
    if line.get("resps") is not None:
        hashes["response_hash"] = digest_of(line["resps"])
    return hashes


def pairs_of(arguments: Any) -> list[list[Any]]:
    """The arguments of a document's requests; since 0.4.3 they have names."""
    requests = arguments if isinstance(arguments, list) else []
    if isinstance(arguments, dict) and has_names(arguments):
        requests = [list(request.values()) for request in arguments.values()]
    return [request for request in requests if isinstance(request, list) and request]


def has_names(arguments: Any) -> bool:
    """Whether these are arguments as the harness logs them since 0.4.3: {"gen_args_0": {"arg_0":
    ...}}."""
    if not isinstance(arguments, dict) or not arguments:
        return False
    return all(isinstance(request, dict) for request in arguments.values())


def prompt_of(arguments: Any) -> Any:
    """The prompt of the first request."""
    for request in pairs_of(arguments):
        return request[0]
    return ""


def answer_of(line: dict[str, Any]) -> Any:
    """What the model said: a text, or the option that it found most likely."""
    answers = line.get("filtered_resps")
    if not isinstance(answers, list):
        return answers
    if len(answers) == 1 and isinstance(answers[0], str):
        return answers[0]
    options = options_of(line.get("arguments"))
    if not options or len(options) != len(answers):
        return None
    likely = []
    for answer, option in zip(answers, options, strict=True):
        if not isinstance(answer, list):
            return None
        likely.append((float(answer[0]), option))
    _, most_likely = max(likely, key=lambda pair: pair[0])
    return most_likely.strip()


def options_of(arguments: Any) -> list[str]:
    """The texts whose likelihoods were asked for; empty if these are no options."""
    options = []
    for request in pairs_of(arguments):
        if len(request) < 2 or not isinstance(request[1], str):
            return []
        options.append(request[1])
    return options


def item_of(line: dict[str, Any], value: Any, score: float) -> dict[str, Any]:
    """The item of a line, whose metric has this value."""
    about: dict[str, Any] = {}
    if isinstance(line.get("doc"), dict):
        about.update(line["doc"])
    about.update(value if isinstance(value, dict) and value else line)
    media = line.get("input_media")
    image = media[0] if media else ""
    image = image or first_of(about, IMAGES)
    return {
        "id": line["doc_id"],
        "score": score,
        "cluster": line.get(GROUP) or str(image or line["doc_id"]),
        "category": first_of(about, CATEGORIES),
        "truth": line.get("target"),
        **line.get(SHOWN, {}),
    }


def fields(value: Any, names: str, where: str) -> dict[str, Any]:
    """The object that a metric's value is; ContractError if it lacks one of these fields."""
    if not isinstance(value, dict) or not set(names.split()) <= set(value):
        raise ContractError(
            f"{where}: the metric is {str(value)[:80]}; expected an object with {names}"
        )
    return value
