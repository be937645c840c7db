"""The settings of the training loss, and the term that they choose."""

import dataclasses
from collections.abc import Callable

from torch import Tensor

from llm2clip_plugin.train.config import LossConfig
from llm2clip_plugin.train.distributed import Group
from llm2clip_plugin.train.losses.base import Features

Terms = dict[str, Callable[[Features], Tensor]]  # name -> weighted loss; a step minimizes their sum


def weighted_terms(config: LossConfig, *, group: Group = None) -> Terms:
    """The terms of a configuration, over the batch of a group of ranks."""
    term = config.term()

    def weighted(features: Features) -> Tensor:
        hashes = features.caption_hashes if config.mask_same_caption else None
        image_ids = features.image_ids if config.mask_same_image else None
        return config.weight * term(
            dataclasses.replace(features, caption_hashes=hashes, image_ids=image_ids, block=config.block, group=group)
        )

    return {config.kind: weighted}
