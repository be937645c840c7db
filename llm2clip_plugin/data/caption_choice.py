"""Which caption of a sample is drawn: evenly over its captions, or by weights of their kinds.

m captions of a sample.
"""

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import BrokenSample, Caption

log = logging.getLogger(__name__)

LOOKED_AT = 64  # samples of a source in which kinds are searched


def parse_weights(specifications: Sequence[str]) -> dict[str, float]:
    """``KIND=WEIGHT`` as in ``short=1``. Raises ValueError for another form, a duplicate, or a weight not above 0."""
    weights: dict[str, float] = {}
    for text in specifications:
        kind, equals, number = text.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not (kind and equals and 0 < weight < float("inf")):
            raise ValueError(f"caption weight {text!r} is not KIND=WEIGHT with a number above 0, as in short=1 long=1")
        if kind in weights:
            raise ValueError(f"caption weights {' '.join(specifications)} name {kind!r} twice")
        weights[kind] = weight
    return weights


def caption_shares(captions: Sequence[Caption], weights: Mapping[str, float]) -> list[float]:
    """(m) probabilities: a kind's is its weight among the kinds that the sample has, shared by its captions.

    Without ``weights`` all are equal. Raises KeyError for a caption of a kind without a weight.
    """
    if not weights:
        return [1 / len(captions)] * len(captions)
    counts = Counter(caption.kind for caption in captions)
    total = sum(weights[kind] for kind in counts)
    return [weights[caption.kind] / counts[caption.kind] / total for caption in captions]


def choose_caption(captions: Sequence[Caption], weights: Mapping[str, float], rng: random.Random) -> Caption:
    """One caption, drawn with one number of ``rng``."""
    if not weights:
        return captions[rng.randrange(len(captions))]
    draw = rng.random()
    for caption, share in zip(captions, caption_shares(captions, weights), strict=True):
        draw -= share
        if draw < 0:
            return caption
    return captions[-1]  # the shares add up to 1 but for rounding


def choose_captions(
    captions: Sequence[Caption], weights: Mapping[str, float], count: int, rng: random.Random
) -> tuple[Caption, ...]:
    """``count`` captions, drawn without replacement until none is left, then again from all."""
    chosen: list[Caption] = []
    left: list[Caption] = []
    while len(chosen) < count:
        left = left or list(captions)
        chosen.append(choose_caption(left, weights, rng))
        left.remove(chosen[-1])
    return tuple(chosen)


def check_kinds(sources: Sequence[Source], weights: Mapping[str, float]) -> None:
    """Raise ValueError if ``weights`` names a kind that no source declares and none of its first captions has.

    A kind that a source's fields declare may be rare; if no checked sample has one, it is logged as a warning.
    """
    if not weights:
        return
    declared = {field.kind for source in sources for field in source.fields}
    present = {kind for source in sources for kind in _kinds_of(source)}
    if unknown := sorted(set(weights) - declared - present):
        known = ", ".join(sorted(declared | present))
        raise ValueError(
            f"caption weights name the kinds {', '.join(unknown)}, which the data does not have; known: {known}"
        )
    if absent := sorted(set(weights) - present):
        log.warning(
            "caption weights name the kinds %s, which no checked sample has; present: %s",
            ", ".join(absent),
            ", ".join(sorted(present)) or "none",
        )


def _kinds_of(source: Source) -> set[str]:
    """The kinds of captions of up to LOOKED_AT evenly spaced samples."""
    kinds: set[str] = set()
    for number in range(0, len(source), max(1, len(source) // LOOKED_AT)):
        try:
            kinds |= {caption.kind for caption in source[number].captions}
        except BrokenSample:
            continue
    return kinds
