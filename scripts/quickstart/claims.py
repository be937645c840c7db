"""What the quickstart claims: the fine-tuned teacher against the raw LLM read well, query by query.

The measure is the mean reciprocal rank (MRR): every query counts by the rank of its right answer, also those that are
not first. The same queries are compared in pairs; families of emoji are drawn as a whole, because their members are
right or wrong together. Interval and p are those of ``llm2clip compare``, p adjusted for the number of claims (Holm).

Shapes: Q queries, S seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from page import Table, fraction

from llava_integration.benchmarks.benchmark import Statistic
from llava_integration.compare.statistics import Difference, compare, holm, pair
from llm2clip_plugin.evaluate.retrieval import QueryRanks

LEVEL = 0.05  # of the test, after Holm's adjustment
MRR = "mean reciprocal rank"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The score of every query in one test."""

    scores: np.ndarray  # (Q,) reciprocal ranks, or hits
    clusters: list[str]  # Q: the queries' families
    chance: float  # mean of a random order
    measure: str = MRR  # name of the scores' mean


Seeds = Mapping[int, Measured]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One test of two teachers on the same queries, over all seeds and for each."""

    name: str
    difference: Difference
    p: float  # adjusted for the number of claims
    by_seed: dict[int, Difference]
    p_by_seed: dict[int, float]  # adjusted
    chance: float
    measure: str
    queries: int
    families: int
    better: float  # fraction of the queries, over all seeds, with a higher score
    worse: float

    @property
    def significant(self) -> bool:
        """Whether the difference over all seeds is."""
        return self.p < LEVEL

    @property
    def seeds_significant(self) -> int:
        """Number of seeds whose own difference is."""
        return sum(p < LEVEL for p in self.p_by_seed.values())


def reciprocal_ranks(ranks: QueryRanks) -> np.ndarray:
    """(Q,) 1 / rank of the best correct item: the expected value, as items of equal score are in random order."""
    wrong, correct = ranks.wrong_equal_Q.double(), ranks.correct_equal_Q.double()
    ahead, value = torch.ones_like(wrong), torch.zeros_like(wrong)  # ahead: the first j of the equals are all wrong
    for j in range(int(wrong.max()) + 1):
        still = ahead * (wrong - j).clamp(min=0) / (wrong + correct - j).clamp(min=1)
        value += (ahead - still) / (ranks.higher_Q + 1 + j)
        ahead = still
    return value.numpy()


def chance_of(pool: int, right: int = 1) -> float:
    """Mean reciprocal rank of the best of ``right`` right answers among ``pool`` in random order."""
    before = np.arange(pool - right + 1)  # answers ahead of it, all wrong
    later = np.cumprod((pool - right - before) / (pool - before))  # probability that one more is
    return float(np.sum((np.concatenate([[1.0], later[:-1]]) - later) / (before + 1)))


def make_claims(tests: Mapping[str, tuple[Seeds, Seeds]]) -> list[Claim]:
    """A claim for each test, name -> (base, new), on the seeds that all of them have; [] without one.

    With several seeds, the interval of their mean contains the spread over seeds; that of each seed does not.
    """
    if not tests:
        return []
    seeds = sorted(set.intersection(*(set(side) for sides in tests.values() for side in sides)))
    if not seeds:
        return []
    total = [_compare([base[s] for s in seeds], [new[s] for s in seeds]) for base, new in tests.values()]
    each = {s: [_compare([base[s]], [new[s]]) for base, new in tests.values()] for s in seeds if len(seeds) > 1}
    each = each or {seeds[0]: total}
    p, p_each = holm([one.p for one in total]), {s: holm([one.p for one in each[s]]) for s in seeds}
    first = [base[seeds[0]] for base, _ in tests.values()]
    changes = [np.sign([new[s].scores - base[s].scores for s in seeds]) for base, new in tests.values()]
    return [
        Claim(
            name=name,
            difference=total[place],
            p=p[place],
            by_seed={s: each[s][place] for s in seeds},
            p_by_seed={s: p_each[s][place] for s in seeds},
            chance=first[place].chance,
            measure=first[place].measure,
            queries=len(first[place].scores),
            families=len(set(first[place].clusters)),
            better=float(np.mean(changes[place] > 0)),
            worse=float(np.mean(changes[place] < 0)),
        )
        for place, name in enumerate(tests)
    ]


def _compare(base: Sequence[Measured], new: Sequence[Measured]) -> Difference:
    """The paired comparison of `llm2clip compare`."""
    sides = [[Statistic(np.stack([one.scores, np.ones(len(one.scores))], 1), _ratio) for one in s] for s in (base, new)]
    return compare(pair(sides[0], sides[1], base[0].clusters))


def _ratio(totals: np.ndarray) -> np.ndarray:
    return totals[..., 0] / totals[..., 1]


# -------------------------------------------------------------------------------------------------- words


def claims_table(
    claims: Sequence[Claim], names: Mapping[str, str], title: str = "Is the fine-tuned LLM the better teacher?"
) -> Table:
    """A row per claim; those that are not significant say so."""
    rows = [
        [
            one.name,
            fraction(one.difference.base),
            fraction(one.difference.new),
            fraction(one.chance),
            interval(one.difference),
            p_value(one.p) + ("" if one.significant else ", not significant"),
        ]
        for one in claims
    ]
    count = len(claims[0].by_seed)
    ranks = "Mean reciprocal rank of the right answer: 1 if it is always first, .5 if always second. "
    below = (
        f"{ranks * (claims[0].measure == MRR)}Difference: the same queries on both sides, 95 % interval over families"
        f"{' and seeds' * (count > 1)} ({count} training{'s' * (count > 1)} a side); p of a paired test, adjusted for "
        f"all {len(claims)} rows (Holm)."
    )
    head = [claims[0].measure, names["raw"], names["tuned"], "chance", "difference", "p"]
    return Table(head=head, rows=rows, below=below, title=title)


def seeds_table(claims: Sequence[Claim]) -> Table:
    """The differences seed by seed, and the number of seeds in which each is significant."""
    seeds = list(claims[0].by_seed)
    rows = [
        [
            one.name,
            *(interval(one.by_seed[seed]) + " *" * (one.p_by_seed[seed] < LEVEL) for seed in seeds),
            f"{one.seeds_significant} of {len(seeds)}",
        ]
        for one in claims
    ]
    below = "Difference of mean reciprocal ranks with its 95 % interval, each seed alone; *: significant (Holm)."
    head = ["by seed", *(f"seed {seed}" for seed in seeds), "significant"]
    return Table(head=head, rows=rows, below=below, title="Is it in every training?")


def interval(difference: Difference) -> str:
    """``+.069 [.061, .077]``."""
    return f"{signed(difference.difference)} [{signed(difference.low)}, {signed(difference.high)}]"


def signed(value: float) -> str:
    """``+.069``, ``-.002``."""
    return f"{value:+.3f}".replace("0.", ".", 1)


def p_value(p: float) -> str:
    """``< .001`` or ``.038``."""
    return "< .001" if p < 0.001 else fraction(p)


def headline(one: Claim) -> str:
    """A claim as a sentence, with its interval and chance."""
    change = one.difference
    p = f"p {p_value(one.p)}" if one.p < 0.001 else f"p = {p_value(one.p)}"
    said = (
        f"{one.name}: mean reciprocal rank {fraction(change.new)} with the fine-tuned LLM, {fraction(change.base)} "
        f"with the raw LLM, read well, {fraction(one.chance)} by chance; difference {interval(change)}, {p}; better "
        f"for {one.better:.0%} of {one.queries:,} queries, worse for {one.worse:.0%}"
    )
    if len(one.by_seed) > 1:
        said += f"; significant in {one.seeds_significant} of {len(one.by_seed)} seeds"
    return said + ("." if one.significant else ". This is NOT significant.")


def as_record(one: Claim) -> dict[str, Any]:
    """The claim for a JSON file."""
    return {
        "name": one.name,
        "measure": one.measure,
        "chance": one.chance,
        "queries": one.queries,
        "families": one.families,
        "better": one.better,
        "worse": one.worse,
        **_numbers(one.difference, one.p),
        "seeds_significant": one.seeds_significant,
        "by_seed": {str(seed): _numbers(one.by_seed[seed], one.p_by_seed[seed]) for seed in one.by_seed},
    }


def _numbers(difference: Difference, p: float) -> dict[str, Any]:
    return {
        "raw": difference.base,
        "tuned": difference.new,
        "difference": difference.difference,
        "interval": [difference.low, difference.high],
        "p": difference.p,
        "p_adjusted": p,
        "significant": bool(p < LEVEL),
        "statistic": difference.test.replace("images", "families"),
    }
