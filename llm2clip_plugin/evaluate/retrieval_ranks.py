"""The rank of each query's best correct item among all items, and the rules for ties.

Recall, caption retrieval accuracy and their bootstrap read `QueryRanks`; `rank_counting.rank_both` counts them.

Shapes: Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from llm2clip_plugin.evaluate.config import TieRule
from llm2clip_plugin.options.names import unknown


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
