"""What some samples of the data say about all: how many captions an image has, and which pairs stage 1 can form."""

from __future__ import annotations

from dataclasses import dataclass

from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import words_of

SURVEYED = 1000  # samples that are read


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What some samples say about all."""

    samples: int
    captions: float  # of a sample
    pairs: str  # how stage 1 pairs captions, QUERY:POSITIVE; "": it can't
    note: str  # why it can't


def survey(source: Source) -> Survey:
    """Read up to SURVEYED samples, evenly spaced."""
    step = max(1, len(source) // SURVEYED)
    texts = [source.captions(number)[1] for number in range(0, len(source), step)]
    flat = [caption for captions in texts for caption in captions]
    if not flat:
        raise ValueError(f"no captions in {source.path}; llm2clip data check shows its fields")
    kinds = [{caption.kind for caption in captions} for captions in texts]
    words = [[f" {words_of(caption.text)} " for caption in captions] for captions in texts if len(captions) > 1]
    nested = sum(any(one != other and one in other for one in each for other in each) for each in words)
    pairs = "short:long" if sum({"short", "long"} <= one for one in kinds) > len(texts) / 2 else "short:same"
    note = ""
    if len(words) <= len(texts) / 2:
        note = "stage 1 is left out: it needs images with several captions (--fields)"
    elif nested > len(words) / 2:
        note = "stage 1 is left out: most captions contain another one of their image, so it learns nothing"
    return Survey(samples=len(source), captions=len(flat) / len(texts), pairs="" if note else pairs, note=note)
