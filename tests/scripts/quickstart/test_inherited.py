"""Inherited words: which concepts LLaVA is shown and asked about; how its answers are scored."""

import inherited
import numpy as np
import pytest


def test_concepts_that_are_shown_and_asked_about_are_of_different_families() -> None:
    family_of = {f"{number}": f"family {number // 3}" for number in range(90)}
    shown, asked = inherited.split_families(family_of, 20, 10)
    assert 20 <= len(shown) <= 22
    assert len(asked) == 10
    families = [family_of[concept] for concept in asked]
    assert len(set(families)) == 10
    assert not {family_of[concept] for concept in shown} & set(families)
    assert inherited.split_families(family_of, 20, 10) == (shown, asked)
    with pytest.raises(ValueError, match="3 families are left for B, fewer than 10"):
        inherited.split_families(family_of, 80, 10)


def test_a_place_is_the_share_of_the_names_below() -> None:
    # two pictures of name 0, one of name 2; three names
    score_NC = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    own_N, exchanged_N = inherited.places(score_NC, [0, 0, 2])
    assert own_N == pytest.approx([1.0, 0.0, 0.5])
    # name 0 for the third picture; name 2 for the first two
    assert exchanged_N == pytest.approx([0.5, 0.5, (0.5 + 1.0) / 2])


def test_a_model_that_does_not_look_scores_nothing() -> None:
    rng = np.random.default_rng(0)
    score_NC = np.tile(rng.normal(size=7), (14, 1))
    own_N, exchanged_N = inherited.places(
        score_NC, [number % 7 for number in range(14)]
    )
    assert own_N - exchanged_N == pytest.approx(np.zeros(14))


def test_arms_are_compared_with_the_first_in_pairs() -> None:
    rng = np.random.default_rng(0)
    base = {seed: rng.normal(size=60) for seed in range(3)}
    new = {seed: score_N + 0.3 for seed, score_N in base.items()}
    families = [str(number // 2) for number in range(60)]
    rows = inherited.compare_arms({"permuted": base, "oracle": new}, families)
    assert "p" not in rows[0]
    assert rows[1]["difference"] == pytest.approx(0.3)
    assert rows[1]["p"] < 0.05
    low, high = rows[1]["difference_interval"]
    assert 0.2 < low < high < 0.4
    assert rows[1]["p_adjusted"] == rows[1]["p"]
    table = inherited.results_table(rows)
    assert "| oracle | 3 |" in table
    assert "not shown" not in table


def test_differences_are_adjusted_for_their_number() -> None:
    rng = np.random.default_rng(0)
    base = {0: rng.normal(size=60)}
    noise = rng.normal(size=60)
    noise -= noise.mean()
    # 2.15 standard errors: p is about .036
    some = {0: base[0] + noise + 2.15 * noise.std(ddof=1) / np.sqrt(60)}
    families = [str(number) for number in range(60)]
    rows = inherited.compare_arms(
        {"permuted": base, "raw": some, "tuned": some}, families
    )
    for row in rows[1:]:
        assert row["p_adjusted"] == pytest.approx(2 * row["p"])
    # by itself it would be shown
    assert rows[1]["p"] < 0.05 < rows[1]["p_adjusted"]
    assert inherited.results_table(rows).count("not shown") == 2
