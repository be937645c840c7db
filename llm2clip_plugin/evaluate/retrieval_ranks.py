"""The rank of each query's best correct item: what recall, caption retrieval accuracy and their bootstrap read.

Shapes: Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class QueryRanks:
    """Three int64 counts per query that decide its hit at any k."""

    higher_Q: Tensor  # items that score strictly above the best correct item
    wrong_equal_Q: Tensor  # wrong items with exactly its score
    correct_equal_Q: Tensor  # correct items with exactly its score, itself included; 0 if the query has no correct item

    def __len__(self) -> int:
        return len(self.higher_Q)

    def select(self, index: Tensor) -> QueryRanks:
        """The counts of some queries; ``index`` is a mask or positions."""
        return QueryRanks(**{name: count_Q[index] for name, count_Q in vars(self).items()})

    def hits(self, k: int) -> Tensor:
        """(Q,) float64 in [0, 1]: is a correct item in the top ``k``? Equal scores are in random order.

        The hit is the probability that a correct item is in the top k: a tie with one wrong item counts one half, with
        n - 1 wrong ones 1 / n, so a tower that gives everything the same embedding gets chance.
        Raises ValueError for k < 1 or a query without a correct item.
        """
        if k < 1:
            raise ValueError(f"recall@{k}: k must be at least 1")
        if missing := int((self.correct_equal_Q == 0).sum()):
            raise ValueError(f"{missing} of {len(self)} queries have no correct item; exclude them with select()")
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
