"""Normalizing short answers as the VQA evaluation does, and its accuracy against ten human answers.

Two processors exist in the field. The *VQA API* one (``processPunctuation`` and ``processDigitArticle`` of the VQA
evaluation, https://visualqa.org/evaluation.html) and the *M4C* one, which first splits words; LLaVA uses the latter for
TextVQA and for the files it sends to the VQAv2 and VizWiz servers. Their quirks are kept; comments mark them.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from llava_integration.benchmarks.benchmark import Item, mean_of, percents

NUMBERS = {"none": "0", **{word: str(value) for value, word in enumerate(
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
)}}  # fmt: skip
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The authors meant a look-behind and wrote a look-ahead for the characters '<=' and a digit, which always holds
# before a full stop: so a full stop goes unless a digit follows ('3.' -> '3', '.5' stays).
FULL_STOP = re.compile(r"\.(?!\d)")
FULL_STOPS_AT_MOST = 32  # re.UNICODE, passed where the count belongs
DIGIT_COMMA = re.compile(r"\d,\d")

CACHED = 1 << 16  # texts: human answers are few words, ten times over

# The contraction table maps each word below without one of its apostrophes to the word.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've
mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
you'll you're you've
""".split()


CONTRACTIONS = {
    **{
        word[:place] + word[place + 1 :]: word
        for word in _CONTRACTED
        for place, letter in enumerate(word)
        if letter == "'"
    },
    "somebody'd": "somebodyd",  # the wrong way round in the original
}


def strip_punctuation(text: str) -> str:
    """Delete a punctuation mark that touches a space anywhere, else make it a space; then full stops.

    A comma between digits anywhere makes every mark go without a space.
    """
    out = text
    delete_all = DIGIT_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if delete_all or mark + " " in text or " " + mark in text else " ")
    return FULL_STOP.sub("", out, count=FULL_STOPS_AT_MOST)


def digits_and_articles(text: str) -> str:
    """Lower case, number words as digits, articles dropped, apostrophes of contractions put back."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def one_line(text: str) -> str:
    """Newlines and tabs as spaces, ends stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=CACHED)
def vqa_api(text: str) -> str:
    """The VQA API's normal form, of a text that went through ``one_line``."""
    return digits_and_articles(strip_punctuation(text))


@lru_cache(maxsize=CACHED)
def m4c(text: str) -> str:
    """The M4C normal form: commas and question marks go first, and ``'s`` becomes a word."""
    split = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return digits_and_articles(strip_punctuation(one_line(split)))


def leave_one_out(prediction: str, humans: Sequence[str]) -> float:
    """Mean over the humans of min(1, matches among the others / 3): 0, .3, .6, .9 or 1 with ten humans."""
    if not humans:
        return 0.0
    matches = sum(answer == prediction for answer in humans)
    scores = [min(1, (matches - (answer == prediction)) / 3) for answer in humans]
    return float(sum(scores)) / len(scores)


def vqa_api_accuracy(prediction: str, humans: Sequence[str]) -> float:
    """Accuracy of the VQA API: texts are normalized only where the humans disagree, so 'Yes' against 'yes' may be 0."""
    prediction, humans = one_line(prediction), [one_line(answer) for answer in humans]
    if len(set(humans)) > 1:
        prediction, humans = vqa_api(prediction), [vqa_api(answer) for answer in humans]
    return leave_one_out(prediction, humans)


def m4c_accuracy(prediction: str, humans: Sequence[str]) -> float:
    """The M4C normal form on both sides, always: TextVQA's rule."""
    return leave_one_out(m4c(prediction), [m4c(answer) for answer in humans])


def vqa_api_numbers(items: Sequence[Item], *parts: str) -> dict:
    """The VQA API's numbers: percent, rounded to 2 places as it does, and the overall number unrounded.

    ``parts``: fields of the items, by which the number is broken down.
    """
    return {
        "overall": round(100 * mean_of(items), 2),
        "overall_unrounded": 100 * mean_of(items),
        **{f"per_{part}": percents(items, part) for part in parts},
    }
