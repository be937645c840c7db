"""Image-text retrieval over embeddings: recall@k in both directions, with any number of captions per image.

Shapes: N images, M captions, D projection dimension, Q queries of one direction.

``i2t``: an image is the query and the captions are ranked, a hit if any correct caption is in the top k (other code
calls this text retrieval). ``t2i``: a caption is the query and the images are ranked (image retrieval).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.bootstrap import Interval, bootstrap_mean
from llm2clip_plugin.console import track
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.pairs import EvalPairs, eval_pairs
from llm2clip_plugin.data.samples import BrokenSample, Caption, select_captions
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.evaluate.config import KS, RetrievalConfig, TieRule
from llm2clip_plugin.options import unknown
from llm2clip_plugin.train.distributed import Group, gather_objects, group_of, rank, sum_over_ranks, world_size
from llm2clip_plugin.vision.dual import DualEncoder, LoadedDualEncoder

# The rank of each query's best correct item among all items, and the rules for ties.


@dataclass(frozen=True, kw_only=True)
class QueryRanks:
    """Four int64 counts per query that decide its hit under every rule for ties."""

    higher_Q: Tensor  # wrong items that score strictly above the best correct item
    wrong_equal_Q: Tensor  # wrong items with exactly its score
    correct_equal_Q: Tensor  # correct items with exactly its score, itself included; 0 if the query has no correct item
    equal_before_Q: Tensor  # items of wrong_equal that precede the first one of correct_equal

    def __len__(self) -> int:
        return len(self.higher_Q)

    def select(self, index: Tensor) -> QueryRanks:
        """The counts of some queries; ``index`` is a mask or positions."""
        return QueryRanks(
            higher_Q=self.higher_Q[index],
            wrong_equal_Q=self.wrong_equal_Q[index],
            correct_equal_Q=self.correct_equal_Q[index],
            equal_before_Q=self.equal_before_Q[index],
        )

    def hits(self, k: int, ties: TieRule = "half") -> Tensor:
        """(Q,) float64 in [0, 1]: is a correct item in the top ``k``?

        - ``half``: items of equal score are in random order, and the hit is the probability that a correct one is in
          the top k. A tie with one wrong item counts one half, with n - 1 wrong ones 1 / n; a tower that gives
          everything the same embedding gets chance.
        - ``optimistic``: the correct item comes first among its equals.
        - ``pessimistic``: every wrong item of equal score comes before it.
        - ``lowest_index_first``: equal scores keep the order of the items (a stable sort).

        Raises ValueError for k < 1, an unknown rule, or a query without a correct item.
        """
        if k < 1:
            raise ValueError(f"recall@{k}: k must be at least 1")
        if bool((self.correct_equal_Q == 0).any()):
            unmatched = torch.nonzero(self.correct_equal_Q == 0).flatten()
            raise ValueError(
                f"{len(unmatched)} of {len(self)} queries have no correct item (first: query {int(unmatched[0])}); "
                "exclude them with select()"
            )
        if ties == "optimistic":
            return (self.higher_Q < k).double()
        if ties == "pessimistic":
            return (self.higher_Q + self.wrong_equal_Q < k).double()
        if ties == "lowest_index_first":
            return (self.higher_Q + self.equal_before_Q < k).double()
        if ties != "half":
            raise ValueError(unknown("tie rule", ties, get_args(TieRule)))
        return 1.0 - self._miss_chance(k)

    def _miss_chance(self, k: int) -> Tensor:
        """Probability that only wrong items fill the top k after the higher ones: hypergeometric.

        C(e, s) / C(e + r, s) = product over j < s of (e - j) / (e + r - j): s places, e wrong and r correct equals.
        """
        wrong_Q, correct_Q = self.wrong_equal_Q.double(), self.correct_equal_Q.double()
        places_Q = (k - self.higher_Q).clamp(min=0)
        miss_Q = torch.ones_like(wrong_Q)
        for j in range(k):
            factor_Q = (wrong_Q - j).clamp(min=0) / (wrong_Q + correct_Q - j).clamp(min=1)
            miss_Q = torch.where(places_Q > j, miss_Q * factor_Q, miss_Q)
        return miss_Q


# Exact ranks in both directions from one pass over the scores, tile by tile.

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


UNIT_TOLERANCE = 1e-6  # error of a norm after fp32 normalization, at some thousand dimensions


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Ranks in both directions, and which images and captions were the queries."""

    i2t: QueryRanks
    t2i: QueryRanks
    image_index_Q: Tensor  # images that were queries: those with at least one correct caption in the pool
    caption_index_Q: Tensor  # captions that were queries, and the pool of i2t
    image_label_N: Tensor
    caption_label_Q: Tensor

    def metrics(self, ks: Sequence[int] = KS, ties: TieRule = "half") -> dict[str, float]:
        """Mean hits, fractions 0 to 1: ``i2t_r1``, ``t2i_r1``, ``i2t_r5`` ..."""
        sides = {"i2t": self.i2t, "t2i": self.t2i}
        return {f"{side}_r{k}": float(ranks.hits(k, ties).mean()) for k in ks for side, ranks in sides.items()}

    def chance(self, ks: Sequence[int] = KS) -> dict[str, float]:
        """Expected value of each of `metrics` for a random order."""
        image_label_Q = self.image_label_N[self.image_index_Q]
        sides = {"i2t": (image_label_Q, self.caption_label_Q), "t2i": (self.caption_label_Q, self.image_label_N)}
        return {f"{side}_r{k}": _chance(*labels, k) for k in ks for side, labels in sides.items()}


def recall(
    image_ND: Tensor,
    text_MD: Tensor,
    owner_M: Tensor,
    ks: Sequence[int] = KS,
    ties: TieRule = "half",
    *,
    group_N: Tensor | None = None,
    block: int = TILE,
    all_ranks: bool = False,
) -> dict[str, float]:
    """Recall@k in both directions by cosine similarity, as fractions: ``i2t_r1``, ``t2i_r1`` ...

    ``image_ND``, ``text_MD``: embeddings, normalized here. ``owner_M``: int, the image of each caption; every image
    has at least one. ``group_N``: int, a label per image (several pictures of one concept): the captions of a group
    are correct for all of its images, and its images for all of its captions; None: every image is its own group.
    ``ties``: see `QueryRanks.hits`. ``block``: rows and columns of a tile of scores. ``all_ranks``: see `rank_both`.

    Raises ValueError for an image without a caption, an owner that is not an image, or non-finite embeddings.
    """
    label_N = torch.arange(len(image_ND)) if group_N is None else group_N.cpu()
    owner_M = owner_M.cpu()
    if len(owner_M) and (int(owner_M.min()) < 0 or int(owner_M.max()) >= len(image_ND)):
        raise ValueError(
            f"owner_M ranges from {int(owner_M.min())} to {int(owner_M.max())}, but there are {len(image_ND)} images"
        )
    retrieval = retrieve(image_ND, text_MD, label_N, label_N[owner_M], block=block, all_ranks=all_ranks)
    if len(retrieval.image_index_Q) < len(image_ND):
        uncaptioned = sorted(set(range(len(image_ND))) - set(retrieval.image_index_Q.tolist()))
        raise ValueError(f"{len(uncaptioned)} of {len(image_ND)} images have no caption (first: {uncaptioned[0]})")
    return retrieval.metrics(ks, ties)


def retrieve(
    image_ND: Tensor,
    text_MD: Tensor,
    image_label_N: Tensor,
    caption_label_M: Tensor,
    *,
    captions: Tensor | None = None,
    block: int = TILE,
    all_ranks: bool = False,
) -> Retrieval:
    """Rank in both directions; a caption is correct for an image if their labels (int) are equal.

    ``captions``: positions or a mask of the captions to use (one kind, one language); None: all. An image without a
    correct caption among them stays in the pool of t2i, but is not a query of i2t.
    """
    image_label_N, caption_label_M = image_label_N.cpu(), caption_label_M.cpu()
    caption_index = torch.arange(len(text_MD))
    if captions is not None:
        caption_index = caption_index[captions.cpu()]
    used_MD = text_MD if captions is None else text_MD[caption_index.to(text_MD.device)]
    image, text = unit_rows(image_ND), unit_rows(used_MD)
    caption_label = caption_label_M[caption_index]
    i2t, t2i = rank_both(image, text, image_label_N, caption_label, tile=block, all_ranks=all_ranks)
    image_index = torch.nonzero(i2t.correct_equal_Q).flatten()
    return Retrieval(
        i2t=i2t.select(image_index),
        t2i=t2i,
        image_index_Q=image_index,
        caption_index_Q=caption_index,
        image_label_N=image_label_N,
        caption_label_Q=caption_label,
    )


def unit_rows(vectors_ND: Tensor) -> Tensor:
    """L2-normalized rows in fp32; the same tensor, not a copy, if they are normalized to fp32's precision."""
    vectors_ND = vectors_ND.float()
    error_N = (torch.linalg.vector_norm(vectors_ND, dim=1) - 1).abs()
    return vectors_ND if bool((error_N <= UNIT_TOLERANCE).all()) else F.normalize(vectors_ND, dim=1)


def shuffled(label_N: Tensor, seed: int = 0) -> Tensor:
    """(N,) labels for the control: every group of images gets the captions of another group.

    Recall under these labels must be at chance; any more does not come from the images.
    Raises ValueError for a single group.
    """
    label = torch.unique(label_N)
    if len(label) < 2:
        raise ValueError("--control needs images of at least two groups")
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(seed)).to(label.device)
    successor = torch.empty_like(label)
    successor[order] = label[order.roll(-1)]  # one cycle through all groups, so none keeps its own
    return successor[torch.searchsorted(label, label_N)]


def _chance(query_label_Q: Tensor, pool_label_I: Tensor, k: int) -> float:
    """Expected recall@k of a random order: 1 - C(I - p, k) / C(I, k), with p correct items among I."""
    label, size = torch.unique(pool_label_I, return_counts=True)
    correct_Q, pool = size[torch.searchsorted(label, query_label_Q)].double(), len(pool_label_I)
    miss_Q = torch.ones_like(correct_Q)
    for j in range(min(k, pool)):
        miss_Q *= (pool - correct_Q - j).clamp(min=0) / (pool - j)
    return float(1 - miss_Q.mean())


# Embed a data source with a dual encoder: every image and every distinct caption once, on all ranks.

Dual = DualEncoder | LoadedDualEncoder
TEXT_BATCH = 512  # captions in one call of the text adapter


@dataclass(frozen=True, kw_only=True)
class EmbeddedPairs:
    """Images and captions in the space that the dual encoder projects to."""

    image_ND: Tensor  # float32, on the CPU, in the source's order
    text_MD: Tensor  # float32, on the CPU; captions with one teacher embedding have the same bits
    owner_M: Tensor  # int64: position among the N of the image that a caption describes
    captions: list[Caption]  # M
    keys: list[str]  # N
    meta: list[dict[str, Any]]  # N: the JSON of each sample
    broken: list[BrokenSample]  # samples left out

    def image_labels(self, field: str = "") -> Tensor:
        """(N,) int64: equal for images with the same value of ``field`` in their JSON; all different for field "".

        Raises ValueError if the field is missing from an image's JSON.
        """
        if not field:
            return torch.arange(len(self.keys))
        values = self.meta_values(field)
        label_of = {value: label for label, value in enumerate(dict.fromkeys(values))}
        return torch.tensor([label_of[value] for value in values])

    def meta_values(self, field: str) -> list[str]:
        """The value of a field of each image's JSON as text (N); ValueError names an image without it."""
        for key, meta in zip(self.keys, self.meta, strict=True):
            if field not in meta:
                known = ", ".join(sorted(meta)) or "none"
                raise ValueError(f"sample {key!r} has no field {field!r} in its JSON; known: {known}")
        return [str(meta[field]) for meta in self.meta]


def embed_pairs(
    dual: Dual,
    source: Source,
    cache: EmbeddingCache,
    images: ImageConfig,
    config: RetrievalConfig,
    *,
    all_ranks: bool = False,
    quiet: bool = False,
) -> EmbeddedPairs:
    """The images of ``source`` and their captions that ``config`` selects (kinds, languages, limit).

    Equal captions get equal bits, whichever images have them: each goes through the text adapter once.
    ``all_ranks``: every rank of the default process group calls this and gets everything; the ranks split the work.
    A sample that is broken or has no such caption is left out and listed in ``broken``.

    Raises ValueError if nothing is left; ContractError if the cache does not belong to this source.
    """
    group = group_of(all_ranks)
    batches = eval_pairs(
        source,
        None,  # captions are read below: all of them on every rank, so that equal ones are encoded once
        images,
        batch=config.batch,
        kinds=config.kinds,
        languages=config.languages,
        indices=range(min(config.limit or len(source), len(source))),
        rank=rank(group),
        world=world_size(group),
        workers=config.workers,
    )
    with evaluating(dual) as encoders:
        encoded = _encode_images(encoders, batches, images, group, show=not quiet and rank(group) == 0)
        if not encoded.index:
            reason = encoded.broken[0] if encoded.broken else "it is empty"
            raise ValueError(f"{source.path} contains no usable images: {reason}")
        teacher_UW, distinct_M, owner_M, captions = _teacher_rows(source, cache, encoded.index, config)
        text_UD = encode_texts(encoders, teacher_UW, all_ranks)
    return EmbeddedPairs(
        image_ND=torch.cat(encoded.vectors),
        text_MD=text_UD[distinct_M],
        owner_M=owner_M,
        captions=captions,
        keys=encoded.keys,
        meta=encoded.meta,
        broken=encoded.broken,
    )


@dataclass
class _EncodedImages:
    """The images of one rank, or of all."""

    index: list[int]  # in the source
    keys: list[str]
    meta: list[dict[str, Any]]
    broken: list[BrokenSample]
    vectors: list[Tensor]  # (b, D) each


def _encode_images(encoders: Dual, batches: EvalPairs, images: ImageConfig, group: Group, show: bool) -> _EncodedImages:
    """This rank's images through the tower; the images of all ranks."""
    normalize = Normalize(images, next(encoders.parameters()).device)
    # Under ZeRO-3 each forward gathers weights from all ranks, so all must make the same number of calls.
    calls = max(gather_objects(len(batches), group))
    own, remaining = _EncodedImages([], [], [], [], []), iter(batches)
    for _ in track(range(calls), total=calls, label="images", unit="batches", show=show):
        batch = next(remaining, None)
        if batch is None:
            encoders.encode_image(normalize(torch.zeros(1, images.size, images.size, 3, dtype=torch.uint8)))
            continue
        own.vectors.append(encoders.encode_image(normalize(batch["pixels"])).float().cpu())
        own.index += batch["image_ids"].tolist()
        own.keys += batch["keys"]
        own.meta += batch["meta"]
    own.broken = batches.broken
    ranks = gather_objects(own, group)
    return _EncodedImages(*([item for part in ranks for item in vars(part)[name]] for name in vars(own)))


def _teacher_rows(
    source: Source, cache: EmbeddingCache, index: Sequence[int], config: RetrievalConfig
) -> tuple[Tensor, Tensor, Tensor, list[Caption]]:
    """Distinct teacher embeddings (U, W); of each caption its row among them (M,) and its image (M,); the captions."""
    row_of: dict[bytes, int] = {}
    rows: list[Tensor] = []
    distinct: list[int] = []
    owner: list[int] = []
    captions: list[Caption] = []
    for image, number in enumerate(index):
        key, of_sample = source.captions(number)
        used = select_captions(of_sample, config.kinds, config.languages)
        embedding_mW = cache.rows(*source.locate(number), used, key=key)
        for row, digest in zip(embedding_mW, row_digests(embedding_mW), strict=True):
            if digest not in row_of:
                row_of[digest] = len(rows)
                rows.append(row)
            distinct.append(row_of[digest])
        owner += [image] * len(used)
        captions += used
    return torch.stack(rows), torch.tensor(distinct), torch.tensor(owner), captions


def encode_texts(encoders: Dual, teacher_UW: Tensor, all_ranks: bool = False) -> Tensor:
    """(U, D) float32 on the CPU; the batches, and so the bits, are the same on any number of ranks."""
    device = next(encoders.parameters()).device
    group = group_of(all_ranks)
    batches = teacher_UW.split(TEXT_BATCH)
    encoded: dict[int, Tensor] = {}
    for start in range(0, len(batches), world_size(group)):
        number = start + rank(group)
        rows = batches[number] if number < len(batches) else batches[0][:1]  # the same number of calls on every rank
        vectors = encoders.encode_text(rows.to(device)).float().cpu()
        if number < len(batches):
            encoded[number] = vectors
    gathered = {number: rows for part in gather_objects(encoded, group) for number, rows in part.items()}
    return torch.cat([gathered[number] for number in range(len(batches))])


@contextmanager
def evaluating(dual: Dual) -> Iterator[Dual]:
    """``dual`` in eval mode without gradients; each submodule's mode is restored afterwards."""
    modes = {module: module.training for module in dual.modules()}
    dual.eval()
    try:
        with torch.no_grad():
            yield dual
    finally:
        for module, training in modes.items():
            module.training = training


# What `llm2clip evaluate` and the evaluation during training report: recall in total and by part, with intervals.

ALL = "all"  # the part with every caption


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Ranks of every part, and what identifies their queries."""

    config: RetrievalConfig
    parts: dict[str, Retrieval]  # ALL first
    pairs: EmbeddedPairs
    cluster_N: list[str]  # bootstrap cluster of each image
    control: Retrieval | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """``i2t_r1`` ... over all captions, ``long:en/i2t_r1`` by part, ``shuffled/...`` and ``chance/...``."""
        flat: dict[str, float] = {}
        for name, part in self.parts.items():
            prefix = "" if name == ALL else f"{name}/"
            flat |= {prefix + key: value for key, value in part.metrics(self.config.ks, self.config.ties).items()}
        if self.control is not None:
            shuffled_metrics = self.control.metrics(self.config.ks, self.config.ties)
            flat |= {f"shuffled/{key}": value for key, value in shuffled_metrics.items()}
            flat |= {f"chance/{key}": value for key, value in self.control.chance(self.config.ks).items()}
        return flat

    def items(self) -> list[dict[str, Any]]:
        """One per query: ``id``, ``score`` (hit at the first k), ``cluster``, ``part``, ``side``, ``r1`` ..."""
        out: list[dict[str, Any]] = []
        for name, part in self.parts.items():
            for side, ranks, index in _sides(part):
                hits = [ranks.hits(k, self.config.ties).tolist() for k in self.config.ks]
                for row, query in enumerate(index):
                    image, label = self._query(side, query)
                    scores = {f"r{k}": hits[column][row] for column, k in enumerate(self.config.ks)}
                    item = {"id": f"{name}/{side}/{label}", "score": hits[0][row], "cluster": self.cluster_N[image]}
                    out.append(item | {"part": name, "side": side, **scores})
        return out

    def intervals(self, resamples: int = 2000) -> dict[str, Interval]:
        """Clustered bootstrap interval of each of `metrics`, except the control's."""
        out: dict[str, Interval] = {}
        for name, part in self.parts.items():
            prefix = "" if name == ALL else f"{name}/"
            for side, ranks, index in _sides(part):
                clusters = [self.cluster_N[self._query(side, query)[0]] for query in index]
                for k in self.config.ks:
                    hits = ranks.hits(k, self.config.ties).numpy()
                    out[f"{prefix}{side}_r{k}"] = bootstrap_mean(hits, clusters, resamples=resamples)
        return out

    def scores(self) -> ScoreFile:
        """The record that `llm2clip compare` reads, without the names of the benchmark and the model."""
        notes = [f"left out: {error}" for error in self.pairs.broken]
        return ScoreFile(benchmark="", metrics=self.metrics(), items=self.items(), counts=self.counts, notes=notes)

    def _query(self, side: str, query: int) -> tuple[int, str]:
        """The image of a query, and the query's name, which is the same in every run."""
        if side == "i2t":
            return query, self.pairs.keys[query]
        image = int(self.pairs.owner_M[query])
        first = int(torch.searchsorted(self.pairs.owner_M, image))
        return image, f"{self.pairs.keys[image]}#{query - first}"


def _sides(part: Retrieval):
    """(name, ranks, positions of the queries) for each direction."""
    return ("i2t", part.i2t, part.image_index_Q.tolist()), ("t2i", part.t2i, part.caption_index_Q.tolist())


def evaluate_retrieval(
    dual: Dual,
    source: Source,
    cache: EmbeddingCache,
    images: ImageConfig,
    config: RetrievalConfig | None = None,
    *,
    all_ranks: bool = False,
    quiet: bool = False,
) -> RetrievalReport:
    """Measure a dual encoder's retrieval on a data source whose captions are in the cache.

    Also for use during training: every submodule keeps its mode (train, eval). ``all_ranks``: every rank of the
    default process group calls this and gets the report; the ranks split the work.
    Raises ValueError if no image is usable, or if samples have no field ``group`` or ``cluster``.
    """
    config = config or RetrievalConfig()
    pairs = embed_pairs(dual, source, cache, images, config, all_ranks=all_ranks, quiet=quiet)
    return report_retrieval(pairs, config, all_ranks=all_ranks, device=next(dual.parameters()).device)


def report_retrieval(
    pairs: EmbeddedPairs, config: RetrievalConfig, *, all_ranks: bool = False, device: torch.device | str = "cpu"
) -> RetrievalReport:
    """Measure retrieval on embedded pairs; ``device``: where scores are computed."""
    image_ND, text_MD = pairs.image_ND.to(device), pairs.text_MD.to(device)
    label_N = pairs.image_labels(config.group)
    label_M = label_N[pairs.owner_M]

    def ranked(image_label_N: Tensor, captions: Tensor) -> Retrieval:
        subset = None if bool(captions.all()) else captions  # all captions need no copy
        return retrieve(image_ND, text_MD, image_label_N, label_M, captions=subset, all_ranks=all_ranks)

    used_M = _distinct_captions(pairs, label_M) if config.group else torch.ones(len(label_M), dtype=torch.bool)
    parts = {ALL: ranked(label_N, used_M)}
    names = [f"{caption.kind}:{caption.language}" for caption in pairs.captions]
    distinct = list(dict.fromkeys(names))
    if config.parts and len(distinct) > 1:
        for name in distinct:
            parts[name] = ranked(label_N, used_M & torch.tensor([other == name for other in names]))
    cluster = config.cluster or config.group
    return RetrievalReport(
        config=config,
        parts=parts,
        pairs=pairs,
        cluster_N=pairs.meta_values(cluster) if cluster else list(pairs.keys),
        control=ranked(shuffled(label_N), used_M) if config.control else None,
        counts={"images": len(pairs.keys), "captions": int(used_M.sum()), "left_out": len(pairs.broken)},
    )


def _distinct_captions(pairs: EmbeddedPairs, label_M: Tensor) -> Tensor:
    """(M,) bool: True for the first of each group's captions with the same text, kind and language."""
    seen: set[tuple[int, Caption]] = set()
    is_first = []
    for caption in zip(label_M.tolist(), pairs.captions, strict=True):
        is_first.append(caption not in seen)
        seen.add(caption)
    return torch.tensor(is_first)
