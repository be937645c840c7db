"""LIFT's loss without negatives: an image lies where its caption does."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llm2clip_plugin.train.losses.base import Features, LossTerm


@dataclass(frozen=True, kw_only=True)
class Cosine(LossTerm):
    """``--loss.terms cosine``: loss = 1/N sum_i (1 - x_i.y_i), the captions' mean if an image has several (LIFT,
    arXiv 2506.04209).

    No pair is compared with another: no logits, no communication, and any batch size gives the same loss in
    expectation. Not alone with a text adapter that trains: both sides may meet in one point, which costs nothing here.
    The side of the captions must be fixed (dual.adapter none), or another term must hold them apart.
    """

    name: ClassVar[str] = "cosine"
    uses_all_captions: ClassVar[bool] = True

    def __call__(self, features: Features) -> Tensor:
        cosine_bk = (features.anchor_bD[:, None] * features.positive_bkD).sum(-1)
        return (1 - cosine_bk.float()).mean()


TERM = Cosine
