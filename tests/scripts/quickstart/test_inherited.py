"""Inherited words: which concepts LLaVA is shown and asked about; how its answers are scored."""

from collections import Counter

import inherited
import numpy as np
import pytest

from llm2clip_plugin.json_files import read_json_value


def test_concepts_that_are_shown_and_asked_about_are_of_different_families() -> None:
    family_of = {f"{number}": f"family {number // 3}" for number in range(90)}
    shown, asked = inherited.split_families(family_of, 20, 10)
    assert 20 <= len(shown) <= 22
    # 30 families, of which 7 are shown
    assert [len(group) for group in asked] == [10, 10]
    families = [family_of[concept] for group in asked for concept in group]
    assert len(set(families)) == 20
    assert not {family_of[concept] for concept in shown} & set(families)
    assert inherited.split_families(family_of, 20, 10) == (shown, asked)
    with pytest.raises(ValueError, match="3 families are left for B, fewer than 10"):
        inherited.split_families(family_of, 80, 10)


def test_each_concept_that_is_asked_about_has_a_picture_and_its_own_name(
    tmp_path,
) -> None:
    inherited.write_data(tmp_path / "data", shown=20, names=40)
    groups = read_json_value(tmp_path / "data" / "groups.json")
    rows = [row for group in groups for row in group]
    assert {len(group) for group in groups} == {40}
    assert len({row["family"] for row in rows}) == len(rows)
    styles = Counter(row["id"].partition("-")[0] for row in rows)
    assert max(styles.values()) - min(styles.values()) <= 1
    captions = read_json_value(tmp_path / "data" / "captions.json")
    shown_names = {row["conversations"][1]["value"] for row in captions}
    assert not shown_names & {row["name"] for row in rows}
    assert captions[0]["conversations"][0]["value"].strip() == "<image>"
    for row in (*captions, *rows):
        assert (tmp_path / "data" / "images" / row["image"]).is_file()


def test_a_place_is_the_share_of_the_names_to_which_the_picture_adds_less() -> None:
    # the model likes name 1 best, whatever it sees. Picture 1 adds as much to name 2 as to its own;
    # picture 2 adds nothing to any name
    score_NC = np.array([[1.0, 8.0, -1.0], [-1.0, 10.0, 1.0], [0.0, 9.0, 0.0]])
    assert inherited.places(score_NC) == pytest.approx([1.0, 0.75, 0.5])


def test_a_model_that_does_not_look_reaches_chance() -> None:
    rng = np.random.default_rng(0)
    score_NC = np.tile(rng.integers(9, size=7), (7, 1))
    assert inherited.places(score_NC) == pytest.approx(np.full(7, inherited.CHANCE))


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
