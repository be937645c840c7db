"""What a loss term gets and what it is; the terms of a configuration; logits over all pairs of a
batch.

Shape letters: b this rank's pairs, N pairs over all ranks, R rows of a block, k texts that belong
to an anchor, D width of the features, T patches of an image, H width of the tower, j kinds of ids.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from llm2clip_plugin.discovery import discover
from llm2clip_plugin.options import unknown
from llm2clip_plugin.train.config import (
    LossConfig,
    TermWeight,
    from_named_args,
    parse_terms,
)
from llm2clip_plugin.train.distributed import (
    ALONE,
    Group,
    gather_together,
    rank,
    sum_own_rows,
)
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import patch_mask

# logit of a pair that is neither positive nor negative; finite, so no inf - inf
EXCLUDED = -1e9
# between ids of two kinds, which are hashes or small numbers; sums wrap around
ID_SPACE = 0x3C6EF372FE94F82B
BLOCK_LOGITS_CPU = 1 << 22  # 16 MiB of fp32: about what stays in cache
BLOCK_LOGITS_GPU = 1 << 27  # 512 MiB


@dataclass(frozen=True, kw_only=True)
class Features:
    """This rank's rows of a batch, as the terms of a loss see them."""

    anchor_bD: Tensor  # L2-normalized: images (stage 2) or queries (stage 1)
    # L2-normalized: the k captions of an image; in stage 1 the positive, then a hard negative
    positive_bkD: Tensor
    log_scale: Tensor  # (1,) natural logarithm of the logits' factor
    bias: Tensor  # (1,) of the logits; 0 where the model learns none
    # (b,) or (j, b) int64: pairs that share one are not negatives of each other
    caption_hashes: Tensor | None
    image_ids: Tensor | None  # (b,) int64, likewise
    # L2-normalized, no gradient: of the reference tower; None if the run has none
    reference_bD: Tensor | None = None
    # of the tower's hidden state ``layer``, float32; None if no term reads them
    patches_bTH: Tensor | None = None
    reference_patches_bTH: Tensor | None = None  # the reference tower's, no gradient
    # patches in the space of the anchors, L2-normalized; None likewise
    patch_features_bTD: Tensor | None = None
    # (b, 2) rows and columns of patches of images that keep their aspect
    spatial_shapes: Tensor | None = None
    progress: float = 1.0  # fraction of the run's steps that are done
    block: int = 0  # rows of the logits held at once; 0 chooses by device
    group: Group = None  # the ranks that hold the batch, b rows on each

    def patch_mask(self, patches: int) -> Tensor | None:
        """(b, T) bool: which of the T patches an image has; None where each has all."""
        if self.spatial_shapes is None:
            return None
        return patch_mask(self.spatial_shapes, patches)

    @property
    def of_batch(self) -> dict[str, Any]:
        """The keyword arguments that contrastive_loss and sigmoid_loss have in common."""
        return {
            name: getattr(self, name)
            for name in ("caption_hashes", "image_ids", "block", "group")
        }


@dataclass(frozen=True, kw_only=True)
class LossTerm(ABC):
    """One loss. Subclasses are frozen dataclasses; their fields are the term's own settings, with
    defaults, which ``--loss.args NAME=VALUE`` sets."""

    name: ClassVar[str]  # of ``--loss.terms``
    uses_bias: ClassVar[bool] = False  # the learned bias of the logits
    needs_reference: ClassVar[bool] = False  # Features.reference_bD
    # of Features.positive_bkD, not the first alone
    uses_all_captions: ClassVar[bool] = False
    # "patches" or "patch_features" of Features, of the hidden state that the term's own field
    # ``layer`` names
    reads: ClassVar[Literal["", "patches", "patch_features"]] = ""

    @abstractmethod
    def __call__(self, features: Features) -> Tensor:
        """This rank's loss, a scalar whose mean over ranks is the loss of the whole batch.

        Its gradient with respect to the features is that of the sum over ranks; the engine averages
        over ranks.
        """


def stack_ids(*ids: Tensor | None) -> Tensor | None:
    """(b,) or (j, b) int64 each -> (j, b) of those that are not None, or None; ids of two arguments
    do not meet."""
    present: list[Tensor] = []
    for kind, ids_of_kind in enumerate(ids):
        if ids_of_kind is not None:
            ids_jb = ids_of_kind.reshape(-1, ids_of_kind.shape[-1])
            present.append(ids_jb + kind * ID_SPACE)
    return torch.cat(present) if present else None


class PairBlocks:
    """The rows of this rank against the columns of all ranks, and which pairs are excluded.

    A loss over all pairs takes their logits in blocks of rows, so that no N x N matrix is ever
    held. It computes its gradient in the forward pass (``with_gradients``) and communicates nothing
    in the backward pass: under an engine that averages the gradients of parameters over ranks, the
    result is the gradient of the loss of one big batch.

    Row i of the anchors and of the positives are a pair; rank r holds the rows [r b, (r + 1) b) of
    the N.
    """

    def __init__(
        self,
        anchor_bD: Tensor,
        positive_bD: Tensor,
        ids_jb: Tensor | None,
        block: int,
        group: Group,
    ) -> None:
        if anchor_bD.shape != positive_bD.shape or anchor_bD.ndim != 2:
            raise ValueError(
                f"anchors {anchor_bD.shape} and positives {positive_bD.shape} "
                "must have one shape (b, D)"
            )
        sent = [positive_bD] if ids_jb is None else [positive_bD, ids_jb.T]
        self.positive_ND, *ids_Nj = gather_together(*sent, group=group)
        self.anchor_bD = anchor_bD.detach()
        self.ids_jb = ids_jb
        self.ids_jN = ids_Nj[0].T.contiguous() if ids_Nj else None
        self.group: Group = group
        self.rows = len(anchor_bD)
        self.columns = len(self.positive_ND)
        self.first = rank(group) * self.rows  # column of row 0's own positive
        budget = (
            BLOCK_LOGITS_CPU if anchor_bD.device.type == "cpu" else BLOCK_LOGITS_GPU
        )
        self.block = block or max(16, budget // self.columns)

    def __iter__(self) -> Iterator[slice]:
        """The rows, a block at a time."""
        for start in range(0, self.rows, self.block):
            yield slice(start, min(start + self.block, self.rows))

    @property
    def own_columns(self) -> slice:
        """The columns of this rank's positives."""
        return slice(self.first, self.first + self.rows)

    def cosines(self, rows: slice) -> Tensor:
        """(R, N) fp32 x_i.y_j."""
        return (self.anchor_bD[rows] @ self.positive_ND.T).float()

    def diagonal(self, rows: slice, matrix_RN: Tensor) -> Tensor:
        """(R,) view of the block's own pairs: row i, column first + i."""
        return matrix_RN.diagonal(self.first + rows.start)[: rows.stop - rows.start]

    def excluded(self, rows: slice) -> Tensor | None:
        """(R, N) bool: off-diagonal pairs that share an id of any kind; None without ids."""
        if self.ids_jb is None or self.ids_jN is None:
            return None
        shape = (rows.stop - rows.start, self.columns)
        same_RN = torch.zeros(shape, dtype=torch.bool, device=self.ids_jN.device)
        # one's first caption may be another's second
        for ids_b, ids_N in product(self.ids_jb, self.ids_jN):
            same_RN |= ids_b[rows, None] == ids_N
        self.diagonal(rows, same_RN).fill_(False)
        return same_RN

    def gradients(
        self, s: Tensor, slope: Callable[[slice], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients for anchors (b, D), own positives (b, D) and this rank's part for the scale ()
        of a loss over logits s x_i.y_j + constants; ``slope``: its derivatives (R, N) by the logits
        of a block of rows."""
        anchor_grad_bD = torch.empty(self.anchor_bD.shape, device=s.device)
        positive_grad_ND = torch.zeros(self.positive_ND.shape, device=s.device)
        for rows in self:
            slope_RN = slope(rows).to(self.anchor_bD.dtype)
            anchor_grad_bD[rows] = (slope_RN @ self.positive_ND).float()
            positive_grad_ND.add_((slope_RN.T @ self.anchor_bD[rows]).float())
        scale_grad = (anchor_grad_bD * self.anchor_bD.float()).sum()
        return (
            anchor_grad_bD.mul_(s),
            sum_own_rows(positive_grad_ND, self.group) * s,
            scale_grad,
        )


class _Known(torch.autograd.Function):
    """A loss, then inputs and as many gradients -> the loss as a function of the inputs."""

    @staticmethod
    def forward(ctx, loss, *tensors):
        inputs = tensors[: len(tensors) // 2]
        grads = tensors[len(tensors) // 2 :]
        saved = [
            grad.to(value.dtype).reshape(value.shape)
            for value, grad in zip(inputs, grads, strict=True)
        ]
        ctx.save_for_backward(*saved)
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        grads = [upstream * grad for grad in ctx.saved_tensors]
        return None, *grads, *[None] * len(grads)


def with_gradients(
    loss: Tensor, inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Tensor:
    """``loss`` (), whose gradient with respect to each input is known already, in any dtype."""
    return _Known.apply(loss, *inputs, *grads)  # pyright: ignore[reportReturnType]


# name -> weighted loss; a step minimizes their sum
Terms = dict[str, Callable[[Features], Tensor]]
ChosenTerms = list[tuple[TermWeight, LossTerm]]


def chosen_terms(config: LossConfig) -> ChosenTerms:
    """The chosen terms with their settings; ValueError names an unknown term or setting."""
    term_classes = discover("llm2clip_plugin.train.losses", "TERM")
    weights = parse_terms(config.terms)
    # NAME=VALUE by term
    settings: dict[str, list[str]] = {weight.name: [] for weight in weights}
    for name in settings:
        if name not in term_classes:
            raise ValueError(unknown("loss term", name, term_classes))
    for word in config.args:
        term, dot, rest = word.partition(".")
        if dot and term in settings:
            settings[term].append(rest)
        elif len(settings) == 1:
            settings[weights[0].name].append(word)
        else:
            raise ValueError(
                f"loss.args: {word!r} names none of the terms {', '.join(settings)}; "
                f"write TERM.{word}"
            )
    terms = []
    for weight in weights:
        name = weight.name
        term = from_named_args(term_classes[name], settings[name], where="loss.args")
        terms.append((weight, term))
    return terms


def check_terms(config: LossConfig, dual: DualConfig) -> None:
    """Raise ValueError if the terms and the dual encoder are incompatible."""
    bias = dual.logit_bias_init
    uses_bias = any(term.uses_bias for _, term in chosen_terms(config))
    has_bias = bias is not None
    if uses_bias != has_bias:
        value = "not set" if bias is None else bias
        expected = "--dual.logit-bias-init must be set for sigmoid (e.g. -10) and unset otherwise"
        raise ValueError(
            f"{expected}; it is {value}, and the terms are {' '.join(config.terms)}"
        )


def needs_reference(terms: ChosenTerms) -> bool:
    """Whether a term compares the tower with a frozen one."""
    return any(term.needs_reference for _, term in terms)


def patch_layers(terms: ChosenTerms) -> dict[str, int]:
    """The hidden states whose patches the terms read: keyword arguments of DualEncoder.forward."""
    readers: list[Any] = [term for _, term in terms if term.reads]
    return {term.reads: term.layer for term in readers}


def check_patch_layers(layers: Mapping[str, int], blocks: int) -> None:
    """Raise ValueError for a term that reads patches of a hidden state that a tower of so many
    blocks does not have. ``layers``: of ``patch_layers``."""
    for reads, layer in layers.items():
        if not -blocks - 1 <= layer <= blocks:
            raise ValueError(
                f"layer {layer} of {reads} is outside the tower's {blocks} blocks; "
                "set it in --loss.args"
            )


def weighted_terms(config: LossConfig, *, group: Group = None) -> Terms:
    """The terms of a configuration, over the batch of a group of ranks."""
    return {
        weight.name: partial(_weighted, config, weight, term, group)
        for weight, term in chosen_terms(config)
    }


def heads_terms(config: LossConfig) -> Terms:
    """The terms that fit heads on a frozen tower, on this rank alone, at the peak of their weights:
    those between images and captions. Raises ValueError if there are none."""
    terms: Terms = {}
    for weight, term in chosen_terms(config):
        if not term.needs_reference and not term.reads:
            peak = max(weight.start, weight.end)
            constant = TermWeight(weight.name, peak, peak)
            terms[weight.name] = partial(_weighted, config, constant, term, ALONE)
    if not terms:
        raise ValueError(
            f"loss.terms {' '.join(config.terms)} has no term between images and captions; "
            "add infonce=1"
        )
    return terms


def _weighted(
    config: LossConfig,
    weight: TermWeight,
    term: LossTerm,
    group: Group,
    features: Features,
) -> Tensor:
    factor = config.weight * weight.at(features.progress)
    if not factor:
        return features.anchor_bD.new_zeros(())
    hashes = features.caption_hashes if config.mask_same_caption else None
    images = features.image_ids if config.mask_same_image else None
    features = dataclasses.replace(
        features,
        caption_hashes=hashes,
        image_ids=images,
        block=config.block,
        group=group,
    )
    return factor * term(features)
