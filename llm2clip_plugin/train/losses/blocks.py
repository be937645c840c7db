"""What the losses over all pairs of a batch share: the logits in blocks of rows, so that no N x N matrix is ever held.

The losses compute their gradient in the forward pass, block by block, and communicate nothing in the backward pass.
Under an engine that averages the gradients of parameters over ranks (DDP, DeepSpeed), the result is exactly the
gradient of the loss of one big batch.

Shape letters: b this rank's pairs, N pairs over all ranks, R rows of one block, D width of the features, j kinds of
ids. Row i of the anchors and row i of the positives are a pair; rank r holds the rows [r b, (r + 1) b) of the N.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llm2clip_plugin.train.distributed import Group, gather_rows, rank

EXCLUDED = -1e9  # logit of a pair that is neither positive nor negative; finite, so no inf - inf
BLOCK_LOGITS_CPU = 1 << 22  # 16 MiB of fp32: about what stays in cache
BLOCK_LOGITS_GPU = 1 << 27  # 512 MiB


def stack_ids(*ids: Tensor | None) -> Tensor | None:
    """(b,) or (j, b) int64 each -> (j, b) of those that are not None, or None."""
    given = [item.reshape(-1, item.shape[-1]) for item in ids if item is not None]
    return torch.cat(given) if given else None


class PairBlocks:
    """The rows of this rank against the columns of all ranks, and which pairs are excluded."""

    def __init__(self, anchor_bD: Tensor, positive_bD: Tensor, ids_jb: Tensor | None, block: int, group: Group) -> None:
        if anchor_bD.shape != positive_bD.shape or anchor_bD.ndim != 2:
            raise ValueError(
                f"anchors {tuple(anchor_bD.shape)} and positives {tuple(positive_bD.shape)} must have one shape (b, D)"
            )
        self.anchor_bD = anchor_bD.detach()
        self.positive_ND = gather_rows(positive_bD, group)
        self.group = group
        self.rows = len(anchor_bD)
        self.columns = len(self.positive_ND)
        self.first = rank(group) * self.rows  # column of row 0's own positive
        self.ids_jb = ids_jb
        self.ids_jN = None if ids_jb is None else gather_rows(ids_jb.T.contiguous(), group).T.contiguous()
        budget = BLOCK_LOGITS_CPU if anchor_bD.device.type == "cpu" else BLOCK_LOGITS_GPU
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
        """(R, N) bool: off-diagonal pairs that share an id; None without ids."""
        if self.ids_jb is None or self.ids_jN is None:
            return None
        same_RN = self.ids_jb[0, rows, None] == self.ids_jN[0]
        for ids_b, ids_N in zip(self.ids_jb[1:], self.ids_jN[1:], strict=True):
            same_RN |= ids_b[rows, None] == ids_N
        self.diagonal(rows, same_RN).fill_(False)
        return same_RN


def gradients_as(grads: tuple[Tensor, ...], *inputs: Tensor) -> list[Tensor]:
    """Each gradient in the dtype and shape of its input."""
    return [grad.to(given.dtype).reshape(given.shape) for grad, given in zip(grads, inputs, strict=True)]
