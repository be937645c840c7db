"""The settings of the training loss: which terms, with which weights over the run; read without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm2clip_plugin.options.names import unknown
from llm2clip_plugin.train.named_args import from_named_args
from llm2clip_plugin.vision.dual_config import DualConfig

if TYPE_CHECKING:
    from llm2clip_plugin.train.losses.base import LossTerm


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
        if self.terms != ("infonce",) or self.args:  # the default is valid, so that --help need not import torch
            self.weighted()
        if self.block < 0 or not math.isfinite(self.weight):
            raise ValueError(f"loss.block {self.block} must be >= 0 and loss.weight {self.weight} finite")

    def weighted(self) -> list[tuple[TermWeight, LossTerm]]:
        """The chosen terms with their settings; ValueError names a setting that none of them has."""
        from llm2clip_plugin.train.losses import loss_terms  # torch

        known, weights = loss_terms(), parse_terms(self.terms)
        for weight in weights:
            if weight.name not in known:
                raise ValueError(unknown("loss term", weight.name, known))
        words = self._words([weight.name for weight in weights])
        return [(w, from_named_args(known[w.name], words[w.name], where="loss.args")) for w in weights]

    def _words(self, names: list[str]) -> dict[str, list[str]]:
        """The words of ``args`` by term, without its name."""
        words: dict[str, list[str]] = {name: [] for name in names}
        for word in self.args:
            term, dot, rest = word.partition(".")
            if dot and term in words:
                words[term].append(rest)
            elif len(names) == 1:
                words[names[0]].append(word)
            else:
                raise ValueError(f"loss.args: {word!r} names none of the terms {', '.join(names)}; write TERM.{word}")
        return words

    def check(self, dual: DualConfig) -> None:
        """Raise ValueError if a term and the dual encoder are incompatible."""
        terms = [term for _, term in self.weighted()]
        if dual.logit_bias_init is None:
            for term in terms:
                if term.uses_bias:
                    raise ValueError(
                        f"loss term {term.name} learns a logit bias: set --dual.logit-bias-init (SigLIP starts at -10)"
                    )
        elif not any(term.uses_bias for term in terms):
            names = ", ".join(term.name for term in terms)
            raise ValueError(f"loss.terms {names} does not use a logit bias: leave dual.logit_bias_init unset")

    @property
    def needs_reference(self) -> bool:
        """Whether a term compares the tower with a frozen one."""
        return any(term.needs_reference for _, term in self.weighted())

    @property
    def patch_layers(self) -> dict[str, int]:
        """The hidden states whose patches the terms read: keyword arguments of DualEncoder.forward."""
        terms: list[Any] = [term for _, term in self.weighted()]
        return {term.reads: term.layer for term in terms if term.reads}
