"""The settings of the training loss: which terms, with which weights over the run; read without torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

INHERIT = (("distill",), ("structure=63.5",))  # terms and args of ProCLIP's first stage: sums over 128 captions a rank


@dataclass(frozen=True)
class TermWeight:
    """A term's weight over the run: linear from ``start`` to ``end``, which it reaches after ``until`` of the run."""

    name: str
    start: float
    end: float
    until: float = 1.0  # fraction of the run's steps

    def at(self, progress: float) -> float:
        """The weight when a fraction ``progress`` of the run is done."""
        return self.end if progress >= self.until else self.start + (self.end - self.start) * progress / self.until

    @property
    def peak(self) -> float:
        """The larger of the two weights."""
        return max(self.start, self.end)


def parse_terms(words: Sequence[str]) -> list[TermWeight]:
    """``NAME`` (weight 1), ``NAME=WEIGHT``, ``NAME=START:END`` or ``NAME=START:END@FRACTION`` -> weights.

    Raises ValueError for another form, a term that is named twice or never counts, or a moment without any weight.
    """
    terms: list[TermWeight] = []
    for word in words:
        name, equals, values = word.partition("=")
        schedule, at, until = values.partition("@")
        start, colon, end = schedule.partition(":")
        try:
            term = TermWeight(
                name,
                float(start) if equals else 1.0,
                float(end if colon else start) if equals else 1.0,
                float(until) if at else 1.0,
            )
        except ValueError:
            term = TermWeight(name, math.nan, math.nan)
        numbers = term.start >= 0 and term.end >= 0 and term.peak < math.inf and 0 < term.until <= 1
        if not (name and numbers and (colon or not at)):
            raise ValueError(
                f"loss.terms: {word!r} is not NAME, NAME=WEIGHT, NAME=START:END or NAME=START:END@FRACTION, with "
                "weights of at least 0, as in infonce=1 distill=0.2 or distill=0:0.2@0.1"
            )
        if not term.peak:
            raise ValueError(f"loss.terms: {word!r} never counts; give {name} a weight above 0, or leave it out")
        terms.append(term)
    if twice := sorted({term.name for term in terms if [other.name for other in terms].count(term.name) > 1}):
        raise ValueError(f"loss.terms {' '.join(words)} names {', '.join(twice)} twice")
    if not terms:
        raise ValueError("loss.terms is empty; give at least one term, as in --loss.terms infonce")
    for progress in (0.0, *(term.until for term in terms)):  # where the sum of the weights can be lowest
        if not any(term.at(progress) for term in terms):
            raise ValueError(f"loss.terms {' '.join(words)}: all weights are 0 after {progress:.0%} of the run")
    return terms


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The training loss, a weighted sum of terms."""

    # terms of the sum as NAME=WEIGHT, or NAME=START:END@FRACTION for a weight that changes linearly over this fraction
    # of the run: infonce (CLIP, LLM2CLIP), sigmoid (SigLIP; needs dual.logit_bias_init), cosine (LIFT), multi_positive,
    # distill (ProCLIP) and patch_reference (both compare with distill.reference), patch_captions (FLAIR)
    terms: tuple[str, ...] = ("infonce",)
    weight: float = 1.0  # factor of the sum
    block: int = 0  # rows of the logits held at once; 0: as many as fit 16 MiB on a CPU, 512 MiB on a GPU
    mask_same_caption: bool = True  # pairs with equal captions are not negatives of each other
    mask_same_image: bool = True  # pairs with the same image are not negatives of each other
    args: tuple[str, ...] = ()  # settings of a term alone, as NAME=VALUE, or TERM.NAME=VALUE if there are several terms

    def __post_init__(self) -> None:
        parse_terms(self.terms)
        if self.block < 0 or not math.isfinite(self.weight):
            raise ValueError(f"loss.block {self.block} must be >= 0 and loss.weight {self.weight} finite")
