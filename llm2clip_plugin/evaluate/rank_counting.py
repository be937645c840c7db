"""Exact ranks in both directions from one pass over the scores, tile by tile.

Ranks are counted: each score is compared with the score of the query's best correct item. So there is no top-k, no
N x M matrix and no loop over rows, and a tile of scores serves both directions.

1. Rows with the same bits are stored once (`Side`), with the number of their copies: identical items then have one
   score and tie exactly, whatever the matrix product does at the edges of a block.
2. Correct pairs are the queries of both sides with the same label. Rows are ordered by label, so that correct pairs
   fill small boxes of few tiles; these are computed first and give each query its best correct score.
3. All tiles are computed; scores above or equal to a query's best correct score are counted, times the item's copies.

Shapes: N rows of one side, U of them distinct, Q queries (distinct pairs of row and label), D width, P correct pairs,
r x c a tile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from llm2clip_plugin.evaluate.retrieval_ranks import QueryRanks
from llm2clip_plugin.train.distributed import group_of, rank, sum_over_ranks, world_size

TILE = 512  # rows and columns of a tile: 1 MiB of scores, which stays in the CPU's cache


@dataclass(frozen=True, kw_only=True)
class Side:
    """The images or the captions: distinct rows, and the queries among them."""

    row_UD: Tensor  # distinct rows in fp32, ordered by label
    copies_U: Tensor  # float32: how many of the N rows have these bits
    query_row_Q: Tensor  # distinct row of each query, ascending
    query_label_Q: Tensor
    query_copies_Q: Tensor  # how many of the N rows are this query
    query_first_Q: Tensor  # the lowest position of these rows
    query_of_N: Tensor  # query of each of the N rows
    key_N: Tensor  # distinct row * (N + 1) + position, ascending; for `copies_before`

    @classmethod
    def build(cls, row_ND: Tensor, label_N: Tensor) -> Side:
        """Order the rows by label, store duplicates once; labels start at 0."""
        device, total = row_ND.device, len(row_ND)
        row_ND = row_ND.float()
        order_N = torch.argsort(label_N, stable=True)
        number_N = distinct_indices(row_ND, order_N)
        row_N = torch.empty_like(number_N).scatter_(0, order_N, number_N)
        position_N = torch.arange(total, device=device)
        distinct = int(number_N.max()) + 1
        first_U = torch.full((distinct,), total, device=device).scatter_reduce(0, row_N, position_N, "amin")
        labels = int(label_N.max()) + 1
        query, query_of_N, copies = torch.unique(row_N * labels + label_N, return_inverse=True, return_counts=True)
        return cls(
            row_UD=row_ND if torch.equal(first_U, position_N) else row_ND[first_U],
            copies_U=torch.bincount(row_N, minlength=distinct).float(),
            query_row_Q=query // labels,
            query_label_Q=query % labels,
            query_copies_Q=copies,
            query_first_Q=torch.full_like(query, total).scatter_reduce(0, query_of_N, position_N, "amin"),
            query_of_N=query_of_N,
            key_N=torch.sort(row_N * (total + 1) + position_N).values,
        )

    def queries(self, start: int, stop: int) -> slice:
        """The queries whose distinct row is in [start, stop)."""
        bounds = torch.searchsorted(self.query_row_Q, torch.tensor([start, stop], device=self.query_row_Q.device))
        return slice(int(bounds[0]), int(bounds[1]))

    def copies_before(self, row: Tensor, position: Tensor) -> Tensor:
        """The number of copies of each distinct ``row`` before the corresponding ``position`` among the N."""
        base = row * (len(self.key_N) + 1)
        return torch.searchsorted(self.key_N, base + position) - torch.searchsorted(self.key_N, base)


@dataclass(frozen=True, kw_only=True)
class _RankCounts:
    """The best correct score and the counts of each query of one side."""

    best_Q: Tensor  # score of the best correct item; +inf for none, so that nothing is counted
    first_Q: Tensor  # position of the first correct item with that score
    correct_equal_Q: Tensor
    counts_3Q: Tensor  # int64: items above, equal (correct ones included), equal and before first_Q

    @classmethod
    def start(cls, query_P: Tensor, score_P: Tensor, queries: int, partner_P: Tensor, partner: Side) -> _RankCounts:
        """The best correct score of each query, from the correct pairs (``query_P``, ``partner_P``); all counts 0."""
        best_Q = torch.full((queries,), -torch.inf, device=score_P.device).scatter_reduce(0, query_P, score_P, "amax")
        tied_P = score_P == best_Q[query_P]
        query, other = query_P[tied_P], partner_P[tied_P]
        zero_Q = torch.zeros(queries, dtype=torch.int64, device=score_P.device)
        return cls(
            best_Q=torch.where(best_Q == -torch.inf, torch.inf, best_Q),
            first_Q=torch.full_like(zero_Q, len(partner.key_N)).scatter_reduce(
                0, query, partner.query_first_Q[other], "amin"
            ),
            correct_equal_Q=zero_Q.scatter_add(0, query, partner.query_copies_Q[other]),
            counts_3Q=zero_Q.repeat(3, 1),
        )

    def add(self, score_rc: Tensor, flag_rc: Tensor, side: Side, rows: slice, partner: Side, columns: slice) -> None:
        """Count one tile: ``rows`` of ``side`` are the queries, ``columns`` of ``partner`` the items.

        ``flag_rc`` is scratch space in fp32: ones and zeros are summed much faster than booleans.
        """
        copies_c = partner.copies_U[columns]
        part = side.queries(rows.start, rows.stop)
        step = max(len(score_rc), TILE)  # a row under several labels is several queries: few rows may be many
        for start in range(part.start, part.stop, step):
            some = slice(start, min(start + step, part.stop))
            one_to_one = part.stop - part.start == len(score_rc)
            score_qc = score_rc if one_to_one else score_rc[side.query_row_Q[some] - rows.start]
            best_q1 = self.best_Q[some, None]
            flag_qc = flag_rc[: len(score_qc)] if len(score_qc) <= len(flag_rc) else torch.empty_like(score_qc)
            higher_q = (torch.gt(score_qc, best_q1, out=flag_qc) @ copies_c).long()
            equal_q = (torch.ge(score_qc, best_q1, out=flag_qc) @ copies_c).long() - higher_q
            self.counts_3Q[0, some] += higher_q
            self.counts_3Q[1, some] += equal_q
            tied = torch.nonzero(equal_q).flatten()
            at, column = torch.nonzero(score_qc[tied] == best_q1[tied], as_tuple=True)
            query = tied[at] + start
            before = partner.copies_before(column + columns.start, self.first_Q[query])
            self.counts_3Q[2].scatter_add_(0, query, before)

    def ranks(self, side: Side) -> QueryRanks:
        """The counts for each of the side's N rows, on the CPU."""
        higher_Q, equal_Q, before_Q = self.counts_3Q
        return QueryRanks(
            higher_Q=higher_Q[side.query_of_N].cpu(),
            wrong_equal_Q=(equal_Q - self.correct_equal_Q)[side.query_of_N].cpu(),
            correct_equal_Q=self.correct_equal_Q[side.query_of_N].cpu(),
            equal_before_Q=before_Q[side.query_of_N].cpu(),
        )


def rank_both(
    first_ND: Tensor,
    second_MD: Tensor,
    first_label_N: Tensor,
    second_label_M: Tensor,
    *,
    tile: int = TILE,
    all_ranks: bool = False,
) -> tuple[QueryRanks, QueryRanks]:
    """Ranks of each first row's best correct item among the second rows, and vice versa.

    The score is the dot product, on the embeddings' device, in fp32 whatever the input dtype, autocast and TF32; rows
    are correct for each other if their labels (int) are equal. A query without a correct item has ``correct_equal`` 0.
    Memory beyond the inputs: a few tiles, the correct pairs, and a copy of a side that is not fp32, has duplicate rows,
    or is not ordered by label.

    ``all_ranks``: every rank of the default process group calls this with the same arrays and gets all results; the
    ranks split the tiles, which are the same for any number of ranks, and so are the results.

    Raises ValueError for mismatched shapes or devices, empty input, or non-finite embeddings.
    """
    _check(first_ND, second_MD, first_label_N, second_label_M)
    _, label = torch.unique(torch.cat([first_label_N.cpu(), second_label_M.cpu()]), return_inverse=True)
    label = label.to(first_ND.device)
    with torch.no_grad(), full_precision(first_ND.device):
        first = Side.build(first_ND, label[: len(first_ND)])
        second = Side.build(second_MD, label[len(first_ND) :])
        grid = _Grid(first, second, tile, all_ranks)
        pair_first_P, pair_second_P = grid.pairs
        score_P = grid.correct_scores()
        forward = _RankCounts.start(pair_first_P, score_P, len(first.query_row_Q), pair_second_P, second)
        backward = _RankCounts.start(pair_second_P, score_P, len(second.query_row_Q), pair_first_P, first)
        for number in grid.numbers():
            rows, columns, score_rc, flag_rc = grid.scores(number, score_P)
            forward.add(score_rc, flag_rc, first, rows, second, columns)
            backward.add(score_rc.T, flag_rc.T, second, columns, first, rows)
        for direction in (forward, backward):
            sum_over_ranks(direction.counts_3Q, grid.group)
    return forward.ranks(first), backward.ranks(second)


class _Grid:
    """The tiles of the score matrix, this rank's part of them, and the correct pairs of each tile."""

    def __init__(self, first: Side, second: Side, tile: int, all_ranks: bool) -> None:
        self.first, self.second, self.tile, self.group = first, second, tile, group_of(all_ranks)
        self.across = -(-len(second.row_UD) // tile)
        area = min(tile, len(first.row_UD)) * min(tile, len(second.row_UD))
        self.tile_2A = torch.empty(2, area, device=first.row_UD.device)  # reused: fresh memory costs page faults
        self.total = -(-len(first.row_UD) // tile) * self.across
        pair_first, pair_second = _correct_pairs(first.query_label_Q, second.query_label_Q)
        number = first.query_row_Q[pair_first] // tile * self.across + second.query_row_Q[pair_second] // tile
        number, order = torch.sort(number)
        self.pairs = pair_first[order], pair_second[order]
        self.starts = torch.searchsorted(number, torch.arange(self.total + 1, device=number.device)).tolist()

    def numbers(self) -> Iterator[int]:
        """This rank's tiles."""
        return iter(range(rank(self.group), self.total, world_size(self.group)))

    def scores(self, number: int, score_P: Tensor) -> tuple[slice, slice, Tensor, Tensor]:
        """A tile's rows, columns, scores, and scratch space of the same shape; valid until the next call.

        Correct pairs get the bits of ``score_P``, so that they equal themselves.
        """
        row, column = number // self.across * self.tile, number % self.across * self.tile
        rows = slice(row, min(row + self.tile, len(self.first.row_UD)))
        columns = slice(column, min(column + self.tile, len(self.second.row_UD)))
        high, wide = rows.stop - row, columns.stop - column
        score_rc, flag_rc = self.tile_2A[:, : high * wide].view(2, high, wide)
        torch.mm(self.first.row_UD[rows], self.second.row_UD[columns].T, out=score_rc)
        part, row_p, column_p = self.inside(number)
        score_rc[row_p - row, column_p - column] = score_P[part]
        return rows, columns, score_rc, flag_rc

    def inside(self, number: int) -> tuple[slice, Tensor, Tensor]:
        """The correct pairs of a tile: their range among the P, and their distinct rows on both sides."""
        part = slice(self.starts[number], self.starts[number + 1])
        row_p = self.first.query_row_Q[self.pairs[0][part]]
        return part, row_p, self.second.query_row_Q[self.pairs[1][part]]

    def correct_scores(self) -> Tensor:
        """(P,) scores of all correct pairs; of each tile only the bounding box of its correct pairs is computed."""
        score_P = torch.zeros(len(self.pairs[0]), device=self.first.row_UD.device)
        for number in self.numbers():
            part, row_p, column_p = self.inside(number)
            if part.start < part.stop:
                top, left = int(row_p.min()), int(column_p.min())
                box_rc = (
                    self.first.row_UD[top : int(row_p.max()) + 1] @ self.second.row_UD[left : int(column_p.max()) + 1].T
                )
                score_P[part] = box_rc[row_p - top, column_p - left]
        return sum_over_ranks(score_P, self.group)  # zero on every other rank


def _correct_pairs(label_Q: Tensor, other_label_R: Tensor) -> tuple[Tensor, Tensor]:
    """All (query, other query) with the same label."""
    label_R, order_R = torch.sort(other_label_R, stable=True)
    start_Q = torch.searchsorted(label_R, label_Q)
    count_Q = torch.searchsorted(label_R, label_Q, right=True) - start_Q
    query_P = torch.repeat_interleave(torch.arange(len(label_Q), device=label_Q.device), count_Q)
    end_Q = count_Q.cumsum(0)
    offset_P = torch.arange(len(query_P), device=label_Q.device) - (end_Q - count_Q)[query_P]
    return query_P, order_R[start_Q[query_P] + offset_P]


def distinct_indices(row_ND: Tensor, order_N: Tensor) -> Tensor:
    """(N,) for the rows in the order of ``order_N``: index among the distinct rows, in order of first appearance."""
    parts = row_ND.split(TILE)  # + 0.0 makes -0.0 a 0.0, in a copy
    checksum_N = torch.cat([(part + 0.0).view(torch.int32).sum(1) for part in parts])  # sums of the bits: exact
    _, group_N, count = torch.unique(checksum_N, return_inverse=True, return_counts=True)
    repeated_N = count[group_N] > 1
    if not bool(repeated_N.any()):
        return torch.arange(len(row_ND), device=row_ND.device)
    positions = torch.nonzero(repeated_N).flatten()
    digest_of: list[bytes | int] = list(range(len(row_ND)))  # a row whose checksum is unique needs no digest
    for position, digest in zip(positions.tolist(), row_digests(row_ND[positions]), strict=True):
        digest_of[position] = digest
    index_of: dict[bytes | int, int] = {}
    indices = [index_of.setdefault(digest_of[position], len(index_of)) for position in order_N.tolist()]
    return torch.tensor(indices, device=row_ND.device)


def row_digests(row_ND: Tensor) -> list[bytes]:
    """A 16-byte digest of each row; equal for rows with the same values."""
    rows = (row_ND.detach().cpu() + 0.0).contiguous().numpy()  # -0.0 becomes 0.0
    return [hashlib.blake2b(row, digest_size=16).digest() for row in rows]


def _check(first_ND: Tensor, second_MD: Tensor, first_label_N: Tensor, second_label_M: Tensor) -> None:
    """Raise ValueError for input that would give a wrong number instead of an error."""
    if first_ND.device != second_MD.device:
        raise ValueError(f"embeddings are on {first_ND.device} and {second_MD.device}; move them to one device")
    if first_ND.ndim != 2 or second_MD.ndim != 2 or first_ND.shape[1] != second_MD.shape[1]:
        raise ValueError(
            f"embeddings must be (N, D) and (M, D), got {tuple(first_ND.shape)} and {tuple(second_MD.shape)}"
        )
    if first_label_N.shape != first_ND.shape[:1] or second_label_M.shape != second_MD.shape[:1]:
        raise ValueError(
            f"labels must be ({len(first_ND)},) and ({len(second_MD)},), one per embedding, "
            f"got {tuple(first_label_N.shape)} and {tuple(second_label_M.shape)}"
        )
    if not len(first_ND) or not len(second_MD):
        raise ValueError(f"nothing to rank: got {len(first_ND)} and {len(second_MD)} embeddings")
    for name, vectors in (("first", first_ND), ("second", second_MD)):
        finite = torch.isfinite(vectors.sum(1))
        if not bool(finite.all()):  # no comparison with a NaN is true, so it would count as a hit
            bad = torch.nonzero(~finite).flatten()
            raise ValueError(f"{len(bad)} of the {name} embeddings are not finite (first: row {int(bad[0])})")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute fp32 matrix products in fp32, without autocast, TF32 or bf16 passes, whatever the caller's settings."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
