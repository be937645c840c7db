"""Inherited words: which concepts LLaVA is shown and asked about; how its answers are scored."""

from collections import Counter
from pathlib import Path

import inherited
import numpy as np
import pytest
import torch
from quickstart_folders import answer_without_training, write_towers
from safetensors.torch import save_file

from llm2clip_plugin.json_files import read_json_value


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """What a LLaVA learns from and is asked."""
    folder = tmp_path_factory.mktemp("inherited") / "data"
    inherited.write_data(folder, shown=20, names=40)
    return folder


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


def test_each_concept_that_is_asked_about_has_a_picture_and_its_own_name(data) -> None:
    groups = read_json_value(data / "groups.json")
    rows = [row for group in groups for row in group]
    assert {len(group) for group in groups} == {40}
    assert len({row["family"] for row in rows}) == len(rows)
    styles = Counter(row["id"].partition("-")[0] for row in rows)
    assert max(styles.values()) - min(styles.values()) <= 1
    captions = read_json_value(data / "captions.json")
    shown_names = {row["conversations"][1]["value"] for row in captions}
    assert not shown_names & {row["name"] for row in rows}
    assert captions[0]["conversations"][0]["value"].strip() == "<image>"
    for row in (*captions, *rows):
        assert (data / "images" / row["image"]).is_file()


def test_a_place_is_the_share_of_the_names_to_which_the_picture_adds_less() -> None:
    # the model likes name 1 best, whatever it sees. Picture 1 adds as much to name 2 as to its own;
    # picture 2 adds nothing to any name
    score_NC = np.array([[1.0, 8.0, -1.0], [-1.0, 10.0, 1.0], [0.0, 9.0, 0.0]])
    assert inherited.places(score_NC) == pytest.approx([1.0, 0.75, 0.5])


def test_a_model_that_does_not_look_reaches_chance() -> None:
    rng = np.random.default_rng(0)
    score_NC = np.tile(rng.integers(9, size=7), (7, 1))
    assert inherited.places(score_NC) == pytest.approx(np.full(7, inherited.CHANCE))


ARMS = ("permuted", "tuned")


def run(folder: Path, *, seeds=(0, 1), shown=20, names=40, steps=1) -> str:
    return inherited.run(
        folder / "towers",
        folder / "llm",
        folder / "output",
        arms=ARMS,
        seeds=seeds,
        shown=shown,
        names=names,
        steps=steps,
    )


@pytest.fixture
def folder(data, tmp_path, monkeypatch) -> Path:
    """Towers of two arms and two seeds, and LLaVAs that answer as their towers' arms say."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "data").symlink_to(data)
    groups = read_json_value(data / "groups.json")
    rng = np.random.default_rng(0)
    own_CC = np.eye(40)
    answers = {}
    for seed in (0, 1):
        noise = rng.normal(size=(len(groups), 40, 40))
        # pictures tell their names, to one arm more than to the other
        for arm, strength in zip(ARMS, (0.5, 2.0), strict=True):
            answers[f"{arm}-seed{seed}"] = (noise + strength * own_CC).tolist()
    write_towers(tmp_path, answers)
    answer_without_training(monkeypatch, answers)
    return tmp_path


def test_answers_are_compared_as_the_gate_does(folder) -> None:
    table = run(folder)
    record = read_json_value(folder / "output" / "inherited.json")
    assert 0.6 < record["places"]["permuted-seed0"] < 0.7
    assert 0.85 < record["places"]["tuned-seed0"] < 0.95
    (comparison,) = record["comparisons"]
    assert (comparison["base"], comparison["new"]) == ARMS
    assert comparison["difference"] > 0.2
    assert comparison["significant"]
    assert "| fine-tuned LLM | 2 |" in table
    assert "| place of the right name | seeds |" in table


def test_what_is_there_is_asked_once(folder, monkeypatch) -> None:
    table = run(folder)
    answer_without_training(monkeypatch, {})
    assert run(folder) == table


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ("towers/tuned-seed1", {}, "tuned-seed1 was made with another tower; remove"),
        ("llm", {}, "permuted-seed0 was made with another language model; remove"),
        ("", {"steps": 2}, "permuted-seed0 was made with another number of steps;"),
        ("", {"shown": 30}, "data was made with another --shown; remove"),
        ("", {"names": 30}, "data was made with another --names; remove"),
    ],
)
def test_answers_of_another_llava_are_refused(
    folder, changed, options, message
) -> None:
    run(folder)
    if changed:
        save_file({"other": torch.ones(1)}, folder / changed / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        run(folder, **options)
