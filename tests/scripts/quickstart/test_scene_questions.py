"""A LLaVA asked about composed scenes: what it is shown and asked, and how answers are scored."""

import re
from pathlib import Path

import numpy as np
import pytest
import scene_questions
import scenes
from quickstart_folders import answer_without_training, write_towers

from llm2clip_plugin.json_files import read_json_value


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """What a LLaVA learns from and is asked, of few scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes.make_scenes(folder / "all", scenes=40, concepts=20)
    scene_questions.write_data(folder / "all", "test", folder / "data")
    return folder / "data"


def test_each_training_scene_is_shown_with_its_caption(data) -> None:
    rows = read_json_value(data / "captions.json")
    assert len(rows) == 40
    for row in rows:
        assert (data / "images" / row["image"]).is_file()
        turn, caption = (part["value"] for part in row["conversations"])
        assert turn.strip() == "<image>"
        assert len(split(caption)) == 3


def split(caption: str) -> list[str]:
    """The first drawing, the relation, and the second drawing of a caption."""
    return re.split(" (above|left of) ", caption)


def test_a_scene_is_followed_by_its_twin_and_no_pair_was_shown(data) -> None:
    groups = read_json_value(data / "groups.json")
    # ten pairs, each in two relations and with a twin; the rest is left out
    assert [len(group) for group in groups] == [16, 16]
    shown = {
        row["conversations"][1]["value"]
        for row in read_json_value(data / "captions.json")
    }
    for group in groups:
        for scene, twin in zip(group[::2], group[1::2], strict=True):
            assert twin["id"] == scenes.twin_of(scene["id"])
            assert twin["family"] == scene["family"]
            assert split(twin["name"]) == split(scene["name"])[::-1]
            assert scene["name"] not in shown
            assert twin["name"] not in shown


def test_too_few_scenes_are_refused(tmp_path) -> None:
    scenes.make_scenes(tmp_path / "all", scenes=4, concepts=6)
    with pytest.raises(ValueError, match="12 test scenes, fewer than 16"):
        scene_questions.write_data(tmp_path / "all", "test", tmp_path / "data")


def test_what_counts_is_what_the_picture_adds() -> None:
    # the model likes the second caption, whatever it sees; the last picture prefers its twin's
    liked_N = np.array([0.0, 5.0, 0.0, 0.0])
    looking_NN = np.eye(4) + liked_N
    looking_NN[3] += [0.0, 0.0, 3.0, 0.0]
    scores = scene_questions.score([looking_NN.tolist()])
    assert scores["caption"] == pytest.approx([1.0, 1.0, 1.0, 2 / 3])
    assert scores["twins"].tolist() == [1.0, 0.0]
    blind_NN = np.tile(liked_N, (4, 1))
    scores = scene_questions.score([blind_NN.tolist()])
    assert scores["caption"] == pytest.approx(np.full(4, 0.5))
    assert scores["twins"].tolist() == [0.0, 0.0]


ARMS = ("permuted", "tuned")


def run(data: Path, folder: Path, **options) -> str:
    return scene_questions.run(
        data.parent / "all",
        folder / "towers",
        folder / "llm",
        folder / "output",
        arms=ARMS,
        seeds=(0, 1),
        steps=1,
        **options,
    )


def test_answers_are_compared(data, tmp_path, monkeypatch) -> None:
    groups = read_json_value(data / "groups.json")
    rng = np.random.default_rng(0)
    answers = {}
    for seed in (0, 1):
        # pictures tell their captions, to one arm more than to the other
        for arm, strength in zip(ARMS, (0.2, 9.0), strict=True):
            of_llava = []
            for group in groups:
                noise_NN = rng.normal(size=(len(group), len(group)))
                score_NN = noise_NN + strength * np.eye(len(group))
                of_llava.append(score_NN.tolist())
            answers[f"{arm}-seed{seed}"] = of_llava
    write_towers(tmp_path, answers)
    answer_without_training(monkeypatch, answers)
    table = run(data, tmp_path)
    record = read_json_value(tmp_path / "output" / "questions.json")
    assert record["means"]["tuned-seed0"]["caption"] > 0.9
    compared = [
        (row["score"], row["base"], row["new"]) for row in record["comparisons"]
    ]
    assert compared == [
        ("caption", "permuted", "tuned"),
        ("twins", "permuted", "tuned"),
    ]
    assert all(row["difference"] > 0.3 for row in record["comparisons"])
    assert "| fine-tuned LLM | 2 |" in table
    assert "| twins, 2 x 2 | fine-tuned LLM minus" in table


def test_answers_about_other_scenes_are_refused(data, tmp_path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "data").symlink_to(data)
    message = "data was made with another split and another set of scenes; remove"
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path, validation=True)
