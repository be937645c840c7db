"""CIDEr (Vedantam et al. 2015), as pycocoevalcap's CIDEr-D computes it, without its Java: captions are tokenized as the
Penn Treebank is, in lower case and without punctuation marks."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

NGRAMS = 4
SIGMA = 6.0  # of the penalty on a difference in length
TOKEN = re.compile(
    r"(?:n't|'(?:s|d|m|re|ve|ll))(?!\w)"  # of don't, it's
    r"|(?:[a-z]\.){2,}|(?<!\w)[a-z]\.(?=\s|$)|(?:mr|mrs|ms|dr|st|vs|jr|sr|co|inc|ltd|etc)\.(?=\s|$)|no\.(?=\s?\d)|[?!]{2,}"
    r"|\d+(?:[.,:/]\d+)*(?:\w|-(?=\w))*|\w+?(?=n't(?!\w))"
    r"|\w(?:\w|[-&/](?=\w)|'(?=\w)(?!(?:s|d|m|re|ve|ll|t)(?!\w)))*|[^\w\s]"
)
DROPPED = frozenset("'`.?!,:;-\"…–—") | {"''", "``", "--", "..."}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
SPLIT = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na")}


def tokens(caption: str) -> Iterator[str]:
    """The words of a caption."""
    for token in map(str, TOKEN.findall(caption.lower().replace("’", "'"))):
        if token not in DROPPED:
            yield from SPLIT.get(token) or [BRACKETS.get(token) or token]


def ngrams(caption: str) -> Counter[tuple[str, ...]]:
    """How often each sequence of one to four words occurs."""
    words = list(tokens(caption))
    return Counter(tuple(words[start : start + n]) for n in range(1, NGRAMS + 1) for start in range(len(words) - n + 1))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The score of each caption against its references; their mean is the corpus' CIDEr (1.1, where papers say 110).

    An n-gram's weight is log(captions / captions with it in a reference), so scores depend on all references, which are
    the benchmark's, but on no other caption.
    """
    all_refs = [[ngrams(one) for one in of_one] for of_one in references]
    frequency = Counter(chain.from_iterable(set(chain.from_iterable(refs)) for refs in all_refs))
    size = math.log(max(1, len(captions)))

    def vector(counts: Counter[tuple[str, ...]]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(NGRAMS)]
        for gram, count in counts.items():
            weights[len(gram) - 1][gram] = count * (size - math.log(max(1, frequency[gram])))
        norms = [math.hypot(*of_n.values()) for of_n in weights]
        return weights, norms, sum(count for gram, count in counts.items() if len(gram) == 2)

    def likeness(caption: str, refs: Sequence[Counter[tuple[str, ...]]]) -> float:
        own, norms, length = vector(ngrams(caption))
        total = 0.0
        for weights, ref_norms, ref_length in map(vector, refs):
            penalty = math.exp(-((length - ref_length) ** 2) / (2 * SIGMA**2))
            for mine, theirs, norm, ref_norm in zip(own, weights, norms, ref_norms, strict=True):
                dot = sum(min(value, theirs[gram]) * theirs[gram] for gram, value in mine.items() if gram in theirs)
                total += dot / (norm * ref_norm or 1) * penalty
        return 10 * total / NGRAMS / max(1, len(refs))

    return [likeness(caption, refs) for caption, refs in zip(captions, all_refs, strict=True)]
