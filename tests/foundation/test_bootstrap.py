"""The bootstrap's intervals cover what they should, with clusters and without."""

import numpy as np
import pytest
from scipy.special import stdtr, stdtrit
from scipy.stats import binomtest

from llm2clip_plugin.bootstrap import (
    bootstrap_mean,
    interval_of_hits,
    t_cdf,
    t_quantile,
)


def simulated(rng, clusters, size, shared):
    """Hits whose chance varies by cluster: mean 0.3; ``shared`` 0 makes the items independent."""
    chance = (
        rng.beta(0.3 / shared, 0.7 / shared, size=clusters)
        if shared
        else np.full(clusters, 0.3)
    )
    hits = rng.random((clusters, size)) < chance[:, None]
    return hits.ravel().astype(float), np.repeat(np.arange(clusters), size).tolist()


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_the_interval_covers_the_true_mean(shared):
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(600):
        values, clusters = simulated(rng, 120, 5, shared)
        interval = bootstrap_mean(values, clusters, resamples=500, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.92 <= covered / 600 <= 0.975  # 0.95 with a standard error of 0.009


def test_ignoring_the_clusters_would_be_too_narrow():
    values, clusters = simulated(np.random.default_rng(2), 120, 10, 0.5)
    clustered = bootstrap_mean(values, clusters)
    single = bootstrap_mean(values)
    assert clustered.clusters == 120
    assert clustered.high - clustered.low > 1.5 * (single.high - single.low)


def test_few_clusters_have_students_width():
    """Percentiles of eight values alone would be a fifth narrower."""
    values = np.random.default_rng(3).normal(size=8)
    interval = bootstrap_mean(values, resamples=20_000)
    width = 2 * t_quantile(0.975, 7) * np.std(values, ddof=1) / 8**0.5
    assert interval.high - interval.low == pytest.approx(width, rel=0.1)


@pytest.mark.parametrize("hit", [0.0, 1.0])
def test_hits_alone_are_no_certainty(hit):
    """14 images with two captions each, all found or none."""
    clusters = [number // 2 for number in range(28)]
    interval = interval_of_hits([hit] * 28, clusters)
    exact = binomtest(int(14 * hit), 14).proportion_ci(method="exact")
    assert (interval.low, interval.high) == pytest.approx((exact.low, exact.high))
    mixed = [hit, *[1.0] * 14, *[0.0] * 13]
    assert interval_of_hits(mixed, clusters) == bootstrap_mean(mixed, clusters)


def test_clusters_of_other_sizes_and_chunks_of_draws_change_nothing_but_the_noise(
    monkeypatch,
):
    values = [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    clusters = ["a", "b", "b", "b", "c", "c"]
    whole = bootstrap_mean(values, clusters, seed=3)
    monkeypatch.setattr("llm2clip_plugin.bootstrap.BLOCK", 7)
    assert bootstrap_mean(values, clusters, seed=3) == whole
    assert whole.mean == 0.5
    assert whole.low == 0.0
    assert whole.high == 1.0


@pytest.mark.parametrize(
    "freedom", [1, 1.5, 2, 3, 4, 7, 29, 100, 999, 2000, 5000, 1_000_000]
)
def test_students_t_is_scipys(freedom):
    """Within 1e-9: the quadrature's error is 1e-12, lgamma's at a million degrees of freedom 3e-10.
    Between 1 and 2 degrees of freedom the density has no derivative at the ends, which the farthest
    quantiles feel."""
    for value in (-40, -5, -1.96, -0.1, 0, 0.3, 1, 3, 8, 30):
        assert t_cdf(value, freedom) == pytest.approx(stdtr(freedom, value), abs=1e-9)
    if freedom <= 2000:
        for level in (0.00001, 0.025, 0.5, 0.8, 0.975, 0.9995):
            assert t_quantile(level, freedom) == pytest.approx(
                stdtrit(freedom, level), rel=1e-5, abs=1e-9
            )
