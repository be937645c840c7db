"""The intervals cover what they claim, tests keep their level, and equal files show no
difference."""

import math

import numpy as np
import pytest

from llava_integration.evaluator.benchmarks.benchmark import Statistic, mean_statistic, ratio
from llava_integration.evaluator.compare.statistics import Paired, compare, holm, in_blocks, pair
from llm2clip_plugin.bootstrap import bootstrap_mean, resample

SIMULATIONS = 1000  # standard error of a coverage of 95 %: 0.7 %
RESAMPLES = 400


def simulate(rng, images, questions, spread, gain=0.08):
    """Right and wrong answers of two models; questions of an image share its difficulty and its
    gain.

    Expected accuracies are .5 and .5 + gain exactly: the spread within images is symmetric and
    nothing is clipped.
    """
    difficulty = rng.uniform(-spread, spread, size=(images, 1))
    better = gain + rng.uniform(-spread, spread, size=(images, 1)) / 2
    base = rng.random((images, questions)) < 0.5 + difficulty
    new = rng.random((images, questions)) < 0.5 + difficulty + better
    names = np.repeat(np.arange(images), questions).astype(str).tolist()
    return base.ravel().astype(float), new.ravel().astype(float), names


def means(base, new, names):
    return pair([mean_statistic(base)], [mean_statistic(new)], names)


def share_covered(simulated, true, resamples=RESAMPLES):
    """How many of the 95 % intervals hold the true difference."""
    results = [
        compare(paired, resamples=resamples, seed=number) for number, paired in enumerate(simulated)
    ]
    return np.mean([result.low <= true <= result.high for result in results])


@pytest.mark.parametrize(
    ("images", "questions", "spread"), [(120, 1, 0.2), (60, 5, 0.25), (40, 12, 0.25)]
)
def test_intervals_cover_the_known_difference(images, questions, spread):
    """93 to 97 % of the 95 % intervals hold the true difference of 8 points."""
    rng = np.random.default_rng(20251125)
    simulated = (means(*simulate(rng, images, questions, spread)) for _ in range(SIMULATIONS))
    assert 0.93 <= share_covered(simulated, 8.0) <= 0.97


def test_ignoring_images_would_not_cover():
    """The clustered simulation is one on which questions taken as independent fail: so the test
    above can fail."""
    rng = np.random.default_rng(7)
    clusters = [str(number) for number in range(480)]
    simulated = (means(*simulate(rng, 40, 12, 0.25)[:2], clusters) for _ in range(200))
    assert share_covered(simulated, 8.0, resamples=300) < 0.92


def f1_statistic(said, truth):
    sums = np.stack([said * truth, said, truth], axis=1)
    return Statistic(
        sums, lambda totals: 100 * ratio(2 * totals[..., 0], totals[..., 1] + totals[..., 2])
    )


def test_composites_are_covered_too():
    """F1, which is no mean of questions: yes-rates on present objects .7 -> .8, on absent ones .3
    -> .25."""
    rng = np.random.default_rng(3)
    true = 100 * (2 * 0.8 / (0.8 + 0.25 + 1) - 2 * 0.7 / (0.7 + 0.3 + 1))
    truth = np.tile([1.0, 0.0], 150)
    names = np.repeat(np.arange(50), 6).astype(str).tolist()

    def drawn():
        chance = rng.random(300)
        base = chance < np.where(truth == 1, 0.7, 0.3)
        new = chance < np.where(truth == 1, 0.8, 0.25)
        return pair([f1_statistic(base * 1.0, truth)], [f1_statistic(new * 1.0, truth)], names)

    assert 0.93 <= share_covered((drawn() for _ in range(SIMULATIONS)), true) <= 0.97


def test_intervals_over_runs_cover():
    """Three seeds a side that move the accuracy by +-3 points: their variance is in the
    interval."""
    rng = np.random.default_rng(11)
    covered = blind = 0
    for number in range(300):
        difficulty = rng.uniform(0.3, 0.6, size=150)
        sides = []
        for gain in (0.0, 0.08):
            moved = [np.clip(difficulty + gain + rng.normal(0, 0.03), 0, 1) for _ in range(3)]
            sides.append(
                [mean_statistic((rng.random(150) < chance).astype(float)) for chance in moved]
            )
        names = [str(place) for place in range(150)]
        result = compare(pair(*sides, names), resamples=300, seed=number)
        alone = compare(pair(sides[0][:1], sides[1][:1], names), resamples=300, seed=number)
        covered += result.low <= 8.0 <= result.high
        blind += alone.low <= 8.0 <= alone.high
        assert result.spread_base > 0
        assert result.test == "t over images and runs"
    assert 0.93 <= covered / 300 <= 0.98
    assert blind / 300 < covered / 300  # one seed a side knows nothing of seeds


def test_slips_of_several_runs_are_counted_once():
    """Three runs a side that know half of the images (.8 right, else .2) and vary by 2 points: the
    error is that of the design. Slips vary over images and between runs; counting both would make
    it 13 % larger."""
    rng = np.random.default_rng(3)
    images = 400
    errors = []
    for number in range(60):
        knows = rng.random((2, 1, images)) < 0.5
        chance = np.where(knows, 0.8, 0.2) + rng.normal(0, 0.02, size=(2, 3, 1))
        right = (rng.random((2, 3, images)) < chance).astype(float)
        sides = [list(map(mean_statistic, runs)) for runs in right]
        clusters = [str(place) for place in range(images)]
        result = compare(pair(*sides, clusters), resamples=300, seed=number)
        errors.append(result.standard_error**2)
    truth = 2 * (0.02**2 / 3 + 0.8 * 0.2 / images / 3 + 0.3**2 / images)
    assert np.mean(errors) ** 0.5 == pytest.approx(100 * truth**0.5, rel=0.06)


def test_many_images_are_resampled_in_blocks():
    """The standard error of 60,000 images with strata is that of the formula, within its own error
    of some percent."""
    rng = np.random.default_rng(5)
    base = rng.random(60_000) < 0.5
    new = rng.random(60_000) < 0.6
    strata = np.repeat([0, 1], [45_000, 15_000])
    sides = [
        Statistic(mean_statistic(side * 1.0).sums, mean_statistic(side * 1.0).value, strata)
        for side in (base, new)
    ]
    paired = pair([sides[0]], [sides[1]], [str(place) for place in range(60_000)])
    small = in_blocks(paired, 2_000, rng)
    assert small.clusters == 2_000
    assert np.bincount(small.strata).tolist() == [1_500, 500]
    assert small.base.sum() == paired.base.sum()
    assert small.new.sum() == paired.new.sum()
    result = compare(small, resamples=2000)
    assert result.standard_error == pytest.approx(
        100 * np.std(new * 1.0 - base) / 60_000**0.5, rel=0.08
    )


def test_the_test_over_runs_is_welchs_where_images_agree():
    """Every image of a run scores the same, so that runs alone vary: .1, .2, .3 against .3, .5, .7.
    By hand: variances .01 and .04, error sqrt(.05 / 3), Satterthwaite's degrees 2.94, taken as 2;
    there p = 1 - t / sqrt(2 + t^2)."""
    names = [str(place) for place in range(20)]
    base = [mean_statistic(np.full(20, value)) for value in (0.1, 0.2, 0.3)]
    new = [mean_statistic(np.full(20, value)) for value in (0.3, 0.5, 0.7)]
    result = compare(pair(base, new, names), resamples=100)
    error = 100 * math.sqrt(0.05 / 3)
    t = 30 / error
    assert (result.difference, result.standard_error) == pytest.approx((30, error))
    assert result.p == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-4)
    assert result.high - result.difference == pytest.approx(4.3027 * error, rel=1e-4)


@pytest.mark.parametrize("size", [1, 7], ids=["one item an image", "up to seven"])
def test_evaluate_and_compare_give_the_same_interval(size):
    """One bootstrap: the mean of the differences item by item, and the difference of the two
    sides."""
    rng = np.random.default_rng(6)
    names = [f"image {n}" for n in range(50) for _ in range(rng.integers(1, size + 1))]
    base, new = rng.random((2, len(names)))
    order = rng.permutation(len(names))  # neither depends on the order of the items
    alone = bootstrap_mean((new - base)[order], [names[n] for n in order], resamples=1000, seed=5)
    paired = compare(means(base, new, names), resamples=1000, seed=5)
    assert (100 * alone.mean, 100 * alone.low, 100 * alone.high) == pytest.approx(
        (paired.difference, paired.low, paired.high), abs=1e-9
    )
    assert alone.clusters == 50


def test_equal_files_give_zero_and_no_win():
    scores = np.random.default_rng(0).random(100)
    result = compare(means(scores, scores, [str(n) for n in range(100)]))
    assert result.difference == 0.0
    assert result.low == 0.0
    assert result.high == 0.0
    assert result.p == 1.0


def test_permutation_keeps_its_level():
    """Without a difference p is below .05 about 5 % of the time, clustered."""
    rng = np.random.default_rng(5)
    found = 0
    for number in range(400):
        found += (
            compare(means(*simulate(rng, 40, 4, 0.2, gain=0.0)), resamples=300, seed=number).p
            < 0.05
        )
    assert 0.025 <= found / 400 <= 0.075
    base, new, names = simulate(rng, 40, 4, 0.2, gain=0.1)
    there, back = (
        compare(means(*both, names), resamples=2000).p for both in ((base, new), (new, base))
    )
    assert there == pytest.approx(back, abs=0.02)  # two-sided


def test_detectable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(9)
    size = compare(means(*simulate(rng, 200, 1, 0.2))).detectable
    found = 0
    for number in range(300):
        result = compare(
            means(*simulate(rng, 200, 1, 0.2, gain=size / 100)), resamples=300, seed=number
        )
        found += not result.low <= 0 <= result.high
    assert 0.72 <= found / 300 <= 0.88


def test_weights_are_integer_draws_within_strata():
    strata = np.array([0, 0, 0, 1, 1, 2])
    drawn = np.concatenate(list(resample(strata, 2000, np.random.default_rng(0))))
    assert drawn.shape == (2000, 6)
    for stratum, size in ((0, 3), (1, 2), (2, 1)):
        assert (drawn[:, strata == stratum].sum(axis=1) == size).all()
    assert drawn.mean(axis=0) == pytest.approx(np.ones(6), abs=0.06)


def test_bootstrap_is_the_naive_loop():
    """Weights times sums give what copying the drawn images' questions gives."""
    rng = np.random.default_rng(2)
    base, _, names = simulate(rng, 12, 3, 0.2)
    said = base
    truth = (rng.random(36) < 0.5).astype(float)
    statistic = f1_statistic(said, truth)
    paired = pair([statistic], [statistic], names)
    order = sorted(set(names))
    for block in resample(paired.strata, 20, np.random.default_rng(4)):
        for weight in block:
            rows = [
                r
                for c, n in enumerate(weight)
                for _ in range(int(n))
                for r in range(36)
                if names[r] == order[c]
            ]
            naive = 200 * (said[rows] * truth[rows]).sum() / (said[rows].sum() + truth[rows].sum())
            assert float(paired.statistic.value(weight @ paired.base[0])) == pytest.approx(naive)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_one_image_gives_an_empty_interval_not_a_crash():
    paired = Paired(
        np.ones((1, 1, 2)), np.ones((1, 1, 2)), mean_statistic([1.0]), np.zeros(1, dtype=int)
    )
    assert compare(paired, resamples=100).difference == 0
