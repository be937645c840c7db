"""The option in a free answer, as VLMEvalKit's exact matching reads it (at e8e78f0; golden answers pin it)."""

import re
from collections.abc import Mapping

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


def letter_of(answer: str, options: Mapping[str, str]) -> str | None:
    """The option by its letter, else by its text; None if neither. 'Z' stands for a refusal: no option, so wrong."""
    return _by_letter(answer, options) or _by_text(answer, options)


def _by_letter(answer: str, options: Mapping[str, str]) -> str | None:
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


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    """The only option whose text the answer, if not much longer than all options, contains in any case."""
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    contained = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return contained[0] if len(contained) == 1 else None
