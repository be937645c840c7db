"""The terms of a configuration as functions of a batch's features."""

import dataclasses
from collections.abc import Callable
from functools import partial

from torch import Tensor

from llm2clip_plugin.train.distributed import Group
from llm2clip_plugin.train.loss_config import LossConfig, TermWeight
from llm2clip_plugin.train.losses.base import Features, LossTerm

Terms = dict[str, Callable[[Features], Tensor]]  # name -> weighted loss; a step minimizes their sum


def weighted_terms(config: LossConfig, *, group: Group = None) -> Terms:
    """The terms of a configuration, over the batch of a group of ranks."""
    return {term.name: partial(_weighted, config, weight, term, group) for weight, term in config.weighted()}


def heads_terms(config: LossConfig, *, group: Group = None) -> Terms:
    """The terms that fit heads on a frozen tower, at the peak of their weights: those between images and captions.

    Raises ValueError if there are none.
    """
    constant = {
        term.name: partial(_weighted, config, TermWeight(term.name, weight.peak, weight.peak), term, group)
        for weight, term in config.weighted()
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
