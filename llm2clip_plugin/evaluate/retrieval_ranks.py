"""Where a query's best right item stands among all items, and the rule for ties.

Recall, caption retrieval accuracy and their bootstrap all read `QueryRanks`; `pairing.rank_both` counts them.

Shape letters: Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

TieRule = Literal["half", "optimistic", "pessimistic", "lowest_index_first"]


@dataclass(frozen=True, kw_only=True)
class QueryRanks:
    """Four counts a query, from which a hit follows under every rule for ties (all int64)."""

    higher_Q: Tensor  # wrong items that score strictly above the best right item
    wrong_equal_Q: Tensor  # wrong items with exactly its score
    right_equal_Q: Tensor  # right items with exactly its score, itself included; 0: the query has no right item
    equal_before_Q: Tensor  # of wrong_equal, those before the first of right_equal in the items' order

    def __len__(self) -> int:
        return len(self.higher_Q)

    def select(self, index: Tensor) -> QueryRanks:
        """The same for some of the queries; ``index`` is a mask or positions."""
        return QueryRanks(
            higher_Q=self.higher_Q[index],
            wrong_equal_Q=self.wrong_equal_Q[index],
            right_equal_Q=self.right_equal_Q[index],
            equal_before_Q=self.equal_before_Q[index],
        )

    def hits(self, k: int, ties: TieRule = "half") -> Tensor:
        """(Q,) float64 in [0, 1]: is a right item among the ``k`` best?

        - ``half``: items of equal score stand in random order, and the hit is the chance that a right one
          is among the k best. A tie with one wrong item counts one half, with n - 1 wrong ones 1 / n; so
          a tower that gives everything the same embedding gets chance, not a half.
        - ``optimistic``: the right item stands first among its equals.
        - ``pessimistic``: every wrong item of equal score stands before it.
        - ``lowest_index_first``: equal scores stand in the items' order (a stable sort).
        """
        if k < 1:
            raise ValueError(f"recall@{k}: k must be at least 1")
        if bool((self.right_equal_Q == 0).any()):
            lacking = torch.nonzero(self.right_equal_Q == 0).flatten()
            raise ValueError(
                f"{len(lacking)} of {len(self)} queries have no right item (the first is query {int(lacking[0])}); "
                "leave them out"
            )
        if ties == "optimistic":
            return (self.higher_Q < k).double()
        if ties == "pessimistic":
            return (self.higher_Q + self.wrong_equal_Q < k).double()
        if ties == "lowest_index_first":
            return (self.higher_Q + self.equal_before_Q < k).double()
        if ties != "half":
            raise ValueError(f"unknown tie rule {ties!r}; known: {', '.join(get_args(TieRule))}")
        return 1.0 - self._miss_chance(k)

    def _miss_chance(self, k: int) -> Tensor:
        """Chance that the places left by the higher items go to wrong ones alone: hypergeometric.

        C(e, s) / C(e + r, s) = product over j < s of (e - j) / (e + r - j): s places, e wrong and r right equals.
        """
        wrong_Q, right_Q = self.wrong_equal_Q.double(), self.right_equal_Q.double()
        places_Q = (k - self.higher_Q).clamp(min=0)
        miss_Q = torch.ones_like(wrong_Q)
        for j in range(k):
            factor_Q = (wrong_Q - j).clamp(min=0) / (wrong_Q + right_Q - j).clamp(min=1)
            miss_Q = torch.where(places_Q > j, miss_Q * factor_Q, miss_Q)
        return miss_Q
