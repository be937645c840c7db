"""The intervals cover what they claim, tests keep their level, and equal files show no
difference."""

import math

import numpy as np
import pytest

from llava_integration.evaluator.benchmarks.benchmark import (
    Statistic,
    mean_of_parts,
    mean_statistic,
    ratio,
)
from llava_integration.evaluator.compare.estimate import Estimate
from llava_integration.evaluator.compare.multiplicity import holm, holm_factors
from llava_integration.evaluator.compare.statistics import compare, pair, with_runs
from llm2clip_plugin.bootstrap import bootstrap_mean, resample, t_cdf, t_quantile
from scripts.benchmarks.attainable import outcomes, probabilities, right_or_wrong
from scripts.benchmarks.coverage import settings
from scripts.benchmarks.coverage import simulate as simulate_setting

SIMULATIONS = 1000  # standard error of a coverage of 95 %: 0.7 %


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


def runs_of(base_MN, new_MN, names):
    base = [mean_statistic(run * 1.0) for run in base_MN]
    return pair(base, [mean_statistic(run * 1.0) for run in new_MN], names)


def share_covered(simulated, true):
    """How many of the 95 % intervals hold the true difference."""
    results = [compare(paired) for paired in simulated]
    return np.mean([result.low <= true <= result.high for result in results])


@pytest.mark.parametrize(
    ("images", "questions", "spread"), [(120, 1, 0.2), (60, 5, 0.25), (40, 12, 0.25)]
)
def test_intervals_cover_the_known_difference(images, questions, spread):
    """93 to 97 % of the 95 % intervals hold the true difference of 8 points."""
    rng = np.random.default_rng(20251125)
    simulated = (
        means(*simulate(rng, images, questions, spread)) for _ in range(SIMULATIONS)
    )
    assert 0.93 <= share_covered(simulated, 8.0) <= 0.97


def test_ignoring_images_would_not_cover():
    """The clustered simulation is one on which questions taken as independent fail: so the test
    above can fail."""
    rng = np.random.default_rng(7)
    clusters = [str(number) for number in range(480)]
    simulated = (means(*simulate(rng, 40, 12, 0.25)[:2], clusters) for _ in range(200))
    assert share_covered(simulated, 8.0) < 0.92


def f1_statistic(said, truth):
    sums = np.stack([said * truth, said, truth], axis=1)
    return Statistic(
        sums,
        lambda totals: 100 * ratio(2 * totals[..., 0], totals[..., 1] + totals[..., 2]),
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
        return pair(
            [f1_statistic(base * 1.0, truth)], [f1_statistic(new * 1.0, truth)], names
        )

    assert 0.93 <= share_covered((drawn() for _ in range(SIMULATIONS)), true) <= 0.97


def test_intervals_over_runs_cover():
    """Three seeds a side that move the accuracy by +-3 points: their variance is in the
    interval."""
    rng = np.random.default_rng(11)
    covered = blind = 0
    for _ in range(300):
        difficulty = rng.uniform(0.3, 0.6, size=150)
        sides = []
        for gain in (0.0, 0.08):
            moved = [
                np.clip(difficulty + gain + rng.normal(0, 0.03), 0, 1) for _ in range(3)
            ]
            sides.append(
                [
                    mean_statistic((rng.random(150) < chance).astype(float))
                    for chance in moved
                ]
            )
        names = [str(number) for number in range(150)]
        result = compare(pair(*sides, names))
        alone = compare(pair(sides[0][:1], sides[1][:1], names))
        covered += result.low <= 8.0 <= result.high
        blind += alone.low <= 8.0 <= alone.high
        assert result.spread_base > 0
        assert result.test == "t over images and runs"
    assert covered / 300 >= 0.93
    assert blind / 300 < covered / 300  # one seed a side knows nothing of seeds


def test_slips_of_several_runs_are_counted_once():
    """Three runs a side that know half of the images (.8 right, else .2) and vary by 2 points: the
    error is that of the design. Slips vary over images and between runs; counting both would make
    it 13 % larger."""
    rng = np.random.default_rng(3)
    images = 400
    errors = []
    for _ in range(60):
        knows = rng.random((2, 1, images)) < 0.5
        chance = np.where(knows, 0.8, 0.2) + rng.normal(0, 0.02, size=(2, 3, 1))
        right = (rng.random((2, 3, images)) < chance).astype(float)
        sides = [list(map(mean_statistic, runs)) for runs in right]
        clusters = [str(number) for number in range(images)]
        result = compare(pair(*sides, clusters))
        errors.append(result.standard_error**2)
    truth = 2 * (0.02**2 / 3 + 0.8 * 0.2 / images / 3 + 0.3**2 / images)
    assert np.mean(errors) ** 0.5 == pytest.approx(100 * truth**0.5, rel=0.06)


def test_the_test_over_runs_is_welchs_where_images_agree():
    """Runs alone vary: 10, 20, 30 against 30, 42, 54. By hand: variances 100 and 144, error
    sqrt(244 / 3), Satterthwaite's degrees 244^2 x 2 / (100^2 + 144^2) = 3.87."""
    images = Estimate(center=22, error=0, freedom=19, skew=0, count=20, span=100)
    values = [np.array([10.0, 20.0, 30.0]), np.array([30.0, 42.0, 54.0])]
    result = with_runs(images, values, [0.0, 0.0])
    error = math.sqrt(244 / 3)
    freedom = 244**2 * 2 / (100**2 + 144**2)
    assert (result.error, result.freedom) == pytest.approx((error, freedom))
    assert result.p() == pytest.approx(2 * (1 - t_cdf(22 / error, freedom)))
    reach = t_quantile(0.975, freedom) * error
    assert result.interval(0.95) == pytest.approx((22 - reach, 22 + reach))


def test_a_single_run_is_told_by_the_other_sides_runs_once():
    """One against 30, 42, 54: both sides vary by 12, told by two degrees of freedom, not by two of
    each side."""
    images = Estimate(center=22, error=0, freedom=19, skew=0, count=20, span=100)
    for values in (
        [np.array([20.0]), np.array([30.0, 42.0, 54.0])],
        [np.array([30.0, 42.0, 54.0]), np.array([20.0])],
    ):
        result = with_runs(images, values, [0.0, 0.0])
        assert result.error == pytest.approx(math.sqrt(144 + 144 / 3))
        assert result.freedom == pytest.approx(2)


def test_a_side_of_few_runs_is_not_taken_to_vary_less_than_half_as_much():
    images = Estimate(center=22, error=0, freedom=19, skew=0, count=20, span=100)
    values = [np.array([20.0, 20.0]), np.array([30.0, 42.0, 54.0])]
    result = with_runs(images, values, [0.0, 0.0])
    pooled = 288 / 3  # three degrees of freedom
    assert result.error == pytest.approx(math.sqrt(pooled / 2 / 2 + 144 / 3))


@pytest.mark.parametrize("size", [1, 7], ids=["one item an image", "up to seven"])
def test_evaluate_and_compare_give_the_same_interval(size):
    """The bootstrap over clusters of the differences item by item, and the test of the two sides:
    the ends are the same within a tenth of the interval."""
    rng = np.random.default_rng(6)
    names = [f"image {n}" for n in range(50) for _ in range(rng.integers(1, size + 1))]
    base, new = rng.random((2, len(names)))
    order = rng.permutation(len(names))  # neither depends on the order of the items
    alone = bootstrap_mean((new - base)[order], [names[n] for n in order], seed=5)
    paired = compare(means(base, new, names))
    assert 100 * alone.mean == pytest.approx(paired.difference)
    assert (100 * alone.low, 100 * alone.high) == pytest.approx(
        (paired.low, paired.high), abs=0.1 * (paired.high - paired.low)
    )
    assert alone.clusters == 50


def test_equal_files_give_zero_and_no_win():
    scores = np.random.default_rng(0).random(100)
    result = compare(means(scores, scores, [str(n) for n in range(100)]))
    assert (result.difference, result.p) == (0.0, 1.0)
    assert -3 < result.low == -result.high < 0


def test_permutation_keeps_its_level():
    """Without a difference p is below .05 about 5 % of the time, clustered."""
    rng = np.random.default_rng(5)
    significant = 0
    for _ in range(400):
        significant += compare(means(*simulate(rng, 40, 4, 0.2, gain=0.0))).p < 0.05
    assert 0.025 <= significant / 400 <= 0.075
    base, new, names = simulate(rng, 40, 4, 0.2, gain=0.1)
    there, back = (
        compare(means(*both, names)).p for both in ((base, new), (new, base))
    )
    assert there == pytest.approx(back, abs=0.02)  # two-sided


def test_detectable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(9)
    size = compare(means(*simulate(rng, 200, 1, 0.2))).detectable
    detected = 0
    for _ in range(300):
        result = compare(means(*simulate(rng, 200, 1, 0.2, gain=size / 100)))
        detected += not result.low <= 0 <= result.high
    assert 0.72 <= detected / 300 <= 0.88


def test_weights_are_integer_draws_within_strata():
    strata = np.array([0, 0, 0, 1, 1, 2])
    drawn = np.concatenate(list(resample(strata, 2000, np.random.default_rng(0))))
    assert drawn.shape == (2000, 6)
    for stratum, size in ((0, 3), (1, 2), (2, 1)):
        assert (drawn[:, strata == stratum].sum(axis=1) == size).all()
    assert drawn.mean(axis=0) == pytest.approx(np.ones(6), abs=0.06)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_holm_adjusts_and_the_interval_that_is_shown_agree():
    """An interval at 1 - alpha / factor excludes 0 if and only if the adjusted p is below alpha,
    also where an earlier comparison was not shown."""
    rng = np.random.default_rng(4)
    for _ in range(200):
        results = []
        for gain in rng.uniform(0, 0.3, size=rng.integers(1, 6)):
            results.append(compare(means(*simulate(rng, 60, 1, 0.1, gain=gain))))
        values = [result.p for result in results]
        for result, p, factor in zip(
            results, holm(values), holm_factors(values), strict=True
        ):
            low, high = result.interval(1 - 0.05 / factor)
            assert (p < 0.05) == (not low <= 0 <= high), (values, p, factor, low, high)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
def test_interval_and_p_are_of_one_test(level):
    """0 is in the interval if and only if p is at least 1 - level: skewed, tied, in clusters of
    unequal size, over runs."""
    rng = np.random.default_rng(8)
    significant = 0
    for number in range(300):
        images = int(rng.integers(3, 40))
        names = (
            np.repeat(np.arange(images), rng.integers(1, 6, size=images))
            .astype(str)
            .tolist()
        )
        runs = 1 + number % 3
        base = rng.random((runs, len(names))) < 0.4
        new = rng.random((runs, len(names))) < rng.uniform(0.3, 1)
        if number % 2:
            new = new * rng.exponential(0.3, size=new.shape)
        result = compare(runs_of(base, new, names), level=level)
        assert result.low <= result.difference <= result.high
        assert (result.p < 1 - level) == (not result.low <= 0 <= result.high)
        significant += result.p < 1 - level
    assert 0 < significant < 300


def test_wins_of_two_runs_are_no_proof():
    """Two runs a side, 30 questions, 10 wins to 7: the variance of a run is at least its slips,
    however near two runs are by chance."""
    base = np.zeros((2, 30))
    new = np.zeros((2, 30))
    new[:, :10] = [[1.0], [0.0]]
    new[:, 10:20] = [[0.0], [1.0]]
    base[0, 20:27] = 1.0
    base[1, 23:30] = 1.0
    result = compare(runs_of(base, new, [str(number) for number in range(30)]))
    assert result.difference == pytest.approx(10)
    assert result.spread_base == result.spread_new == 0
    assert result.p > 0.2
    assert result.low < 0


def test_without_a_disagreement_the_interval_is_not_empty():
    """Thirty questions without a change say no more than that at most a tenth or so changes."""
    names = [str(number) for number in range(30)]
    scores = np.arange(30) % 2 * 1.0
    result = compare(means(scores, scores, names))
    assert (result.difference, result.p) == (0.0, 1.0)
    assert result.high == -result.low == pytest.approx(9.2, abs=0.1)
    assert result.detectable == pytest.approx(13, abs=0.5)
    always = compare(means(np.zeros(30), np.ones(30), names))
    assert always.difference == always.high == 100.0
    assert 75 < always.low < 90
    assert always.p < 1e-6


def test_ties_wins_and_losses_are_bonetts_and_prices():
    """Their adjusted interval, by hand, where differences are not skewed: 4 wins, 4 losses, 92
    ties: (4 - 4) / 102 +- t sqrt((5 + 5) / 102 / 102); here the two added questions are 2 x .92."""
    names = [str(number) for number in range(100)]
    base = np.repeat([0.0, 1.0], [4, 96])
    new = np.repeat([1.0, 0.0, 1.0], [4, 4, 92])
    result = compare(means(base, new, names))
    added = 2 * 0.92
    error = (
        100
        * math.sqrt(8 / (1 - 1 / 100) + added / (1 - 1 / (100 + added)))
        / (100 + added)
    )
    assert result.standard_error == pytest.approx(error)
    assert result.high == -result.low == pytest.approx(t_quantile(0.975, 99) * error)


def test_clusters_of_one_size_are_students():
    """Differences that are all unlike, one question an image: the paired t test, but for skew."""
    rng = np.random.default_rng(2)
    differences = rng.normal(0.1, 0.2, size=40)
    names = [str(number) for number in range(40)]
    result = compare(means(np.zeros(40), differences, names))
    error = 100 * np.std(differences, ddof=1) / math.sqrt(40)
    assert result.standard_error == pytest.approx(error)
    assert result.estimate.freedom == pytest.approx(39)
    reach = t_quantile(0.975, 39) * error
    ends = (result.difference - reach, result.difference + reach)
    assert (result.low, result.high) == pytest.approx(ends, abs=0.06 * reach)
    assert result.low <= ends[0] + 1e-9
    assert result.high >= ends[1] - 1e-9


def test_few_large_clusters_count_as_few():
    sizes = [100] * 5 + [2] * 100
    names = np.repeat(np.arange(105), sizes).astype(str).tolist()
    rng = np.random.default_rng(1)
    base, new = rng.random((2, len(names)))
    assert 3 < compare(means(base, new, names)).estimate.freedom < 8


def test_one_image_says_nothing():
    result = compare(means(np.zeros(5), np.ones(5), ["a"] * 5))
    assert (result.difference, result.low, result.high, result.p) == (
        100.0,
        -100.0,
        100.0,
        1.0,
    )


# of scripts/benchmarks/coverage.py, whose table of 1,000 simulations is in docs/benchmarks.md
SEEDED = {
    "30 questions, 2% won, 0% lost": 0.93,
    "50 questions, nine in ten tied": 0.92,
    "5 images of 100, 100 of 2": 0.93,
    "3 images of 50, 30 of 2": 0.93,
    "2 and 2 runs that do not vary, 30 questions": 0.94,
    "2 and 2 runs that vary by 3 points, 300 questions": 0.94,
    "all pairs of 4 models, 100 questions": 0.93,
    "mean of categories of 5 and 100 questions": 0.93,
    "mean of categories of 1 and 100 questions": 0.93,
    "mean of categories of 2 and 500 questions": 0.93,
    "3 paired runs that vary by 3 points together, 300 questions": 0.94,
}


@pytest.mark.parametrize("name", SEEDED)
def test_coverage(name):
    (setting,) = [setting for setting in settings() if setting.name == name]
    outcome = simulate_setting(setting, 400)
    assert outcome.covered >= SEEDED[name]
    assert outcome.wrong_verdicts is None or outcome.wrong_verdicts <= 0.07


@pytest.mark.parametrize("questions", [["a"] * 5, ["a"]], ids=["one image", "one item"])
def test_one_cluster_detects_nothing(questions):
    scores = np.ones(len(questions))
    result = compare(means(scores, scores, questions))
    assert result.detectable == 100.0
    assert result.detects_nothing


def test_three_items_detect_nothing():
    """Two degrees of freedom reach beyond the largest difference that there can be."""
    few = compare(means(np.array([1.0, 0, 1]), np.ones(3), ["1", "2", "3"]))
    assert few.detects_nothing
    names = [str(number) for number in range(40)]
    many = compare(means(np.array([1.0, 0] * 20), np.ones(40), names))
    assert not many.detects_nothing


def test_large_scores_that_differ_a_little_are_no_ties():
    """Scores near a million, of which each of new is one more or so."""
    rng = np.random.default_rng(0)
    base = rng.uniform(1e6, 2e6, size=40)
    new = base + rng.normal(1, 0.1, size=40)
    statistics = [mean_statistic(side, scale=1.0) for side in (base, new)]
    names = [str(number) for number in range(40)]
    result = compare(pair(statistics[:1], statistics[1:], names), span=2e6)
    assert result.difference == pytest.approx(1, abs=0.1)
    assert result.p < 1e-6


def of_parts(base, new, parts, names):
    statistics = [mean_of_parts(parts, side, 100.0) for side in (base, new)]
    return compare(pair(statistics[:1], statistics[1:], names))


def test_categories_are_welchs():
    """Two categories of 5 and 40, by hand: half of each mean, variances and degrees of freedom of
    each."""
    rng = np.random.default_rng(3)
    small = rng.normal(0.1, 0.2, size=5)
    large = rng.normal(0.1, 0.2, size=40)
    parts = ["small"] * 5 + ["large"] * 40
    names = [str(number) for number in range(45)]
    result = of_parts(np.zeros(45), np.concatenate([small, large]), parts, names)
    variances = [2500 * np.var(side, ddof=1) / len(side) for side in (small, large)]
    below = variances[0] ** 2 / 4 + variances[1] ** 2 / 39
    assert result.standard_error == pytest.approx(sum(variances) ** 0.5)
    assert result.estimate.freedom == pytest.approx(sum(variances) ** 2 / below)


def test_two_items_of_a_category_cannot_vary_more_than_their_scores():
    """One of two items won, of 50 in the other category half won, half lost: the two items alone
    would make the interval t_1 = 12.7 times a quarter wide, so that nothing but the span is left.
    The largest variance that two differences up to 1 can have is (1/4)^2 + (1/4)^2 of the mean."""
    parts = ["few"] * 2 + ["many"] * 50
    new = [1.0, 0.5] + [1.0, 0.0] * 25
    base = [0.0, 0.5] + [0.0, 1.0] * 25
    names = [str(number) for number in range(52)]
    paired = pair(
        [mean_of_parts(parts, base, 100.0)], [mean_of_parts(parts, new, 100.0)], names
    )
    result = compare(paired)
    assert result.difference == pytest.approx(25)
    assert result.standard_error == pytest.approx(100 * (2 / 16) ** 0.5, rel=0.05)
    assert result.high - result.low < 150  # of 200
    assert (result.p < 0.05) == (not result.low <= 0 <= result.high)


def test_the_exact_limit_of_few_changes():
    """Where 2 % of 30 questions change, no critical value comes nearer to 95 %; the program for
    exact coverage agrees with a sum by hand: two questions, of which none is ever shown."""
    ours, exact = right_or_wrong(30, 0.02, 0.0)
    assert ours == pytest.approx(exact, abs=1e-3)
    assert right_or_wrong(2, 0.5, 0.5)[0] == pytest.approx(1)
    outcome_O2 = outcomes(3)
    assert len(outcome_O2) == 10
    assert probabilities(outcome_O2, 3, 0.5, 0.2).sum() == pytest.approx(1)


def test_images_with_questions_of_several_categories_are_no_strata():
    rng = np.random.default_rng(3)
    names = [str(number // 2) for number in range(60)]
    result = of_parts(*rng.random((2, 60)), ["a", "b"] * 30, names)
    assert result.estimate.freedom == pytest.approx(29)


def test_categories_of_one_item_each_say_nothing():
    result = of_parts(np.zeros(5), np.ones(5), list("abcde"), list("12345"))
    assert (result.low, result.high, result.p) == (-100.0, 100.0, 1.0)
