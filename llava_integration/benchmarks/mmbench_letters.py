"""The option in a free answer: heuristics of VLMEvalKit's exact matching (at e8e78f0) and lmms-eval's static MMBench
(at 75571cf). Golden answers in the tests pin both."""

import re
from collections.abc import Mapping, Sequence

API_FAILED = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
MARKS_AS_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
LAST_WORDS = 4  # a letter counts only among the last words


def letter_vlmevalkit(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that VLMEvalKit's exact matching reads: by letter, else by the option's text; None if neither.

    'Z' stands for a refusal, which is no option and so wrong.
    """
    return _letter_by_word(answer, options) or _letter_by_text(
        answer, options, longest=2 * sum(map(len, options.values()))
    )


def _letter_by_word(answer: str, options: Mapping[str, str]) -> str | None:
    if API_FAILED in answer:
        return None
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    words = answer.translate(MARKS_AS_SPACES).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - LAST_WORDS:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    named_after = ANSWER_IS.search(answer)
    return named_after[1].upper() if named_after and named_after[1].upper() in options else None


def _letter_by_text(answer: str, options: Mapping[str, str], longest: int | None = None) -> str | None:
    """The only option whose text the answer contains, in any case."""
    answer = answer.lower()
    if longest is not None and len(answer) > longest:
        return None
    contained = [letter for letter, text in options.items() if text.lower() in answer]
    return contained[0] if len(contained) == 1 else None


# the ways of writing a letter that lmms-eval's prefetch knows, after the bare letter
AROUND = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip


def letter_lmms_eval(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that lmms-eval's prefetch reads; E counts as a letter whether there is such an option or not."""
    return _prefetched_letter(answer) or _letter_by_text(answer, options)


def _prefetched_letter(answer: str) -> str | None:
    if API_FAILED in answer:
        return None
    words = answer.split()
    named = [letter for letter in "ABCDE" if letter in words]
    article = "A" in words and len(words) > 3
    if len(named) == 1 and not article:
        return named[0]
    for before, behind in AROUND:
        written = [letter for letter in "ABCDE" if before + letter + behind in words]
        if len(written) == 1:
            return written[0]
    return None


PHRASES = (
    "the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is", "best answer is",
    "the correct option is", "correct option is", "the best option is", "best option is", "the choice is", "choice is",
    "the correct choice is", "correct choice is", "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


def mcq_letter(answer: str, letters: Sequence[str]) -> str:
    """lmms-eval's extraction where its prefetch gives None: the letter with the highest rank, '' without any.

    Ranks: a letter at the start, at the end, behind a phrase like 'the answer is', in parentheses, before '.', ':',
    ')', a space, anywhere; within a rank the last place wins, at one place the earlier letter of the alphabet.
    """
    if not answer.strip():
        return ""
    text = answer.strip()
    for mark in (",", ".", "!", "?", ";", ":", "'", '"'):
        text = text.strip(mark)
    bare = text.strip()
    text = f" {text} "
    candidates: list[tuple[int, int, str]] = []  # rank, place, letter
    for rank, (before, behind) in ((6, ("(", ")")), (5, ("", ".")), (4, ("", ":")), (3, ("", ")")), (2, ("", " "))):
        candidates += [(rank, text.rfind(before + x + behind), x) for x in letters if before + x + behind in text]
    low = text.lower()
    for phrase in PHRASES:
        if (start := low.find(phrase)) != -1:
            places = [(text.find(x, start + len(phrase)), x) for x in letters]
            candidates += [(7, place, x) for place, x in places if place != -1]
    candidates += [(10, 0, x) for x in letters if bare.startswith(x) and not bare[1:2].isalpha()]
    candidates += [(9, len(text) - 1, x) for x in letters if bare.endswith(x) and not bare[-2:-1].isalpha()]
    if not candidates:
        candidates = [(0, text.rfind(x), x) for x in letters if x in text]
    return max(candidates, key=lambda entry: entry[:2])[2] if candidates else ""
