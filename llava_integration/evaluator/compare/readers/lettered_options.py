"""The options of a question whose log has them only in the prompt's text: "A. this", "(B) that"."""

import re
from string import ascii_uppercase
from typing import Any

# how options begin, the surest first: on lines of their own, then in the middle of one
STYLES = (
    r"^[ \t]*\({}\)[ \t]*",
    r"^[ \t]*{}[.):][ \t]*",
    r"(?<!\S)\({}\)[ \t]*",
    r"(?<!\S){}\.[ \t]+",
    r"(?<!\S){}[):][ \t]+",
)
TRUTH = re.compile(r"\(?([A-Z])\)?\.?")  # A, (A), A.


def lettered_options(prompt: Any, truth: Any) -> list[str]:
    """The options of the last question in a prompt (there may be examples before it); empty unless
    they are A, B and so on, and the right answer is one of these letters."""
    if isinstance(truth, list) and len(truth) == 1:
        truth = truth[0]
    letter = TRUTH.fullmatch(str(truth).strip())
    if letter is None or not isinstance(prompt, str):
        return []
    for style in STYLES:
        options = options_in_style(prompt, style)
        if len(options) > ascii_uppercase.index(letter[1]):
            return options
    return []


def options_in_style(prompt: str, style: str) -> list[str]:
    """The texts from the last A that has a B after it, each up to the next letter or its line's
    end; empty if there are no two."""
    starts: list[re.Match[str]] = []
    for start in places_of("A", prompt, style):
        in_order = [start]
        for letter in ascii_uppercase[1:]:
            following = places_of(letter, prompt, style, after=in_order[-1].end())
            if not following:
                break
            in_order.append(following[0])
        if len(in_order) > 1:
            starts = in_order
    ends = [start.start() for start in starts[1:]]
    options = []
    for start, end in zip(starts, [*ends, len(prompt)], strict=False):
        text = prompt[start.end() : end].strip()
        first_line, _, _ = text.partition("\n")
        options.append(first_line.strip(" ,;"))
    return options


def places_of(
    letter: str, prompt: str, style: str, *, after: int = 0
) -> list[re.Match[str]]:
    """Where options with this letter begin."""
    pattern = re.compile(style.format(letter), re.MULTILINE)
    return list(pattern.finditer(prompt, after))
