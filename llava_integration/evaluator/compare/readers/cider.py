"""CIDEr (Vedantam et al. 2015), as pycocoevalcap's CIDEr-D computes it, without its Java: captions
are tokenized as the Penn Treebank is, in lower case and without punctuation marks."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


Gram = tuple[str, ...]


def ngrams(words: Sequence[str]) -> Counter[Gram]:
    """How often each sequence of one to four words occurs."""
    counts: Counter[Gram] = Counter()
    for n in range(1, NGRAMS + 1):
        for start in range(len(words) - n + 1):
            counts[tuple(words[start : start + n])] += 1
    return counts


def cider(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    words_of: Callable[[str], Iterable[str]] = tokens,
) -> list[float]:
    """The score of each caption against its references; their mean is the corpus' CIDEr (1.1, where
    papers say 110). ``words_of`` splits a caption.

    An n-gram's weight is log(captions / captions with it in a reference): scores depend on the
    benchmark's references.
    """
    all_refs = []
    frequency: Counter[Gram] = Counter()
    for texts in references:
        refs = [ngrams(list(words_of(text))) for text in texts]
        all_refs.append(refs)
        frequency.update(set(chain.from_iterable(refs)))
    log_captions = math.log(max(1, len(captions)))
    scores = []
    for caption, refs in zip(captions, all_refs, strict=True):
        counts = ngrams(list(words_of(caption)))
        vector = weighted(counts, frequency, log_captions)
        total = 0.0
        for ref in refs:
            total += likeness(vector, weighted(ref, frequency, log_captions))
        scores.append(10 * total / NGRAMS / max(1, len(refs)))
    return scores


@dataclass(frozen=True, kw_only=True)
class Vector:
    """A text as weights of its n-grams."""

    weights: list[dict[Gram, float]]  # for n from 1 to NGRAMS
    norms: list[float]
    length: int  # in pairs of words


def weighted(
    counts: Counter[Gram], frequency: Mapping[Gram, int], log_captions: float
) -> Vector:
    """A text's n-grams, each weighted by how rare it is in the references."""
    weights: list[dict[Gram, float]] = [{} for _ in range(NGRAMS)]
    length = 0
    for gram, count in counts.items():
        rarity = log_captions - math.log(max(1, frequency[gram]))
        weights[len(gram) - 1][gram] = count * rarity
        if len(gram) == 2:
            length += count
    norms = [math.hypot(*of_n.values()) for of_n in weights]
    return Vector(weights=weights, norms=norms, length=length)


def likeness(caption: Vector, ref: Vector) -> float:
    """The sum over n of the cosines of clipped weights, less for another length."""
    difference = caption.length - ref.length
    penalty = math.exp(-(difference**2) / (2 * SIGMA**2))
    total = 0.0
    for n in range(NGRAMS):
        ref_weights = ref.weights[n]
        dot = 0.0
        for gram, weight in caption.weights[n].items():
            if gram in ref_weights:
                dot += min(weight, ref_weights[gram]) * ref_weights[gram]
        total += dot / (caption.norms[n] * ref.norms[n] or 1) * penalty
    return total
