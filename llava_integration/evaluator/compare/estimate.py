"""An estimated difference, with what a t test needs of it. Its p-value and its intervals come from
one test, so that they agree: an interval holds the differences that the test does not reject."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm2clip_plugin.bootstrap import t_cdf, t_quantile

LEAST_SKEW = 1e-6  # a smaller one is none


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the test knows of a difference: its p-value and intervals of every level.

    The t statistic is transformed for skewed influences. With the standardized mean
    ``w = center / error / sqrt(count)`` and the skewness s, Hall (1992) refers
    ``g(w) = w + s w^2 / 3 + s^2 w^3 / 27 + s / (6 count)``, times ``sqrt(count)``, to Student's t.
    Neither end of an interval is nearer than without the transformation.
    """

    center: float
    error: float  # standard error of the center
    freedom: float  # degrees of freedom; 0: nothing is known
    skew: float  # of the influences
    count: float  # clusters
    span: float  # the largest difference there can be

    def p(self) -> float:
        """Two-sided p of no difference."""
        if self.freedom == 0:
            return 1.0
        if self.error == 0:
            return float(self.center == 0)
        root = math.sqrt(self.count)
        mean = self.center / self.error / root
        t = root * min(abs(mean), abs(self._transformed(mean)))
        return min(1.0, 2 * (1 - t_cdf(t, self.freedom)))

    def interval(self, level: float) -> tuple[float, float]:
        """The differences that a test at 1 - level does not reject."""
        if self.freedom == 0:
            return -self.span, self.span
        root = math.sqrt(self.count)
        reach = t_quantile(0.5 + level / 2, self.freedom) / root
        deviation = self.error * root
        low = self.center - deviation * max(reach, self._untransformed(reach))
        high = self.center - deviation * min(-reach, self._untransformed(-reach))
        return max(low, -self.span), min(high, self.span)

    def _transformed(self, mean: float) -> float:
        """Hall's transformation of a standardized mean."""
        skew = self.skew
        quadratic = skew * mean**2 / 3
        cubic = skew**2 * mean**3 / 27
        return mean + quadratic + cubic + skew / (6 * self.count)

    def _untransformed(self, value: float) -> float:
        """The standardized mean whose transformed value this is."""
        skew = self.skew
        if abs(skew) < LEAST_SKEW:
            return value
        cubed = 1 + skew * (value - skew / (6 * self.count))
        return 3 / skew * (float(np.cbrt(cubed)) - 1)


def combine(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Standard error and Satterthwaite's degrees of freedom of a sum of variances, each with its
    own."""
    total = sum(variance for variance, _ in parts)
    error = math.sqrt(total)
    below = sum(variance**2 / freedom for variance, freedom in parts)
    if not below:
        _, first_freedom = parts[0]
        return error, first_freedom
    return error, max(1.0, total**2 / below)
