"""The terms of a configuration, as functions of a batch's features."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from llm2clip_plugin.discovery import discover
from llm2clip_plugin.options.names import unknown
from llm2clip_plugin.train.distributed import Group
from llm2clip_plugin.train.loss_config import LossConfig, TermWeight, parse_terms
from llm2clip_plugin.train.losses.base import Features, LossTerm
from llm2clip_plugin.train.named_args import from_named_args
from llm2clip_plugin.vision.dual_config import DualConfig

Terms = dict[str, Callable[[Features], Tensor]]  # name -> weighted loss; a step minimizes their sum


def loss_terms() -> dict[str, type[LossTerm]]:
    """Every loss term by name."""
    return discover("llm2clip_plugin.train.losses", "TERM")


def chosen_terms(config: LossConfig) -> list[tuple[TermWeight, LossTerm]]:
    """The chosen terms with their settings; ValueError names a term or a setting that there is not."""
    known, weights = loss_terms(), parse_terms(config.terms)
    words: dict[str, list[str]] = {weight.name: [] for weight in weights}
    for name in words:
        if name not in known:
            raise ValueError(unknown("loss term", name, known))
    for word in config.args:
        term, dot, rest = word.partition(".")
        if dot and term in words:
            words[term].append(rest)
        elif len(words) == 1:
            words[weights[0].name].append(word)
        else:
            raise ValueError(f"loss.args: {word!r} names none of the terms {', '.join(words)}; write TERM.{word}")
    return [(w, from_named_args(known[w.name], words[w.name], where="loss.args")) for w in weights]


def check_terms(config: LossConfig, dual: DualConfig) -> None:
    """Raise ValueError if the terms and the dual encoder are incompatible."""
    with_bias = [term.name for _, term in chosen_terms(config) if term.uses_bias]
    if with_bias and dual.logit_bias_init is None:
        raise ValueError(
            f"loss term {with_bias[0]} learns a logit bias: set --dual.logit-bias-init (SigLIP starts at -10)"
        )
    if dual.logit_bias_init is not None and not with_bias:
        raise ValueError(
            f"loss.terms {' '.join(config.terms)} does not use a logit bias: leave dual.logit_bias_init unset"
        )


def needs_reference(config: LossConfig) -> bool:
    """Whether a term compares the tower with a frozen one."""
    return any(term.needs_reference for _, term in chosen_terms(config))


def patch_layers(config: LossConfig) -> dict[str, int]:
    """The hidden states whose patches the terms read: keyword arguments of DualEncoder.forward."""
    terms: list[Any] = [term for _, term in chosen_terms(config)]
    return {term.reads: term.layer for term in terms if term.reads}


def weighted_terms(config: LossConfig, *, group: Group = None) -> Terms:
    """The terms of a configuration, over the batch of a group of ranks."""
    return {weight.name: partial(_weighted, config, weight, term, group) for weight, term in chosen_terms(config)}


def heads_terms(config: LossConfig, *, group: Group = None) -> Terms:
    """The terms that fit heads on a frozen tower, at the peak of their weights: those between images and captions.

    Raises ValueError if there are none.
    """
    constant = {
        weight.name: partial(_weighted, config, TermWeight(weight.name, weight.peak, weight.peak), term, group)
        for weight, term in chosen_terms(config)
        if not term.needs_reference and not term.reads
    }
    if not constant:
        raise ValueError(f"loss.terms {' '.join(config.terms)} has no term between images and captions; add infonce=1")
    return constant


def _weighted(config: LossConfig, weight: TermWeight, term: LossTerm, group: Group, features: Features) -> Tensor:
    factor = config.weight * weight.at(features.progress)
    if not factor:
        return features.anchor_bD.new_zeros(())
    hashes = features.caption_hashes if config.mask_same_caption else None
    image_ids = features.image_ids if config.mask_same_image else None
    return factor * term(
        dataclasses.replace(features, caption_hashes=hashes, image_ids=image_ids, block=config.block, group=group)
    )
