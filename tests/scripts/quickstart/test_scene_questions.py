"""A LLaVA asked about composed scenes: what it is shown and asked, and how answers are scored."""

import json
from pathlib import Path

import numpy as np
import pytest
import scene_questions
import scenes
from miniature_data import YES_NO

from llm2clip_plugin.json_files import read_json_value


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """What a LLaVA learns from and is asked, of few scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes.make_scenes(folder / "all", scenes=40, concepts=20)
    scene_questions.write_data(folder / "all", "test", folder / "data")
    return folder / "data"


def test_each_training_scene_has_its_caption_and_a_question(data) -> None:
    rows = read_json_value(data / "captions.json")
    assert len(rows) == 80
    answers = set()
    for told, asked in zip(rows[::2], rows[1::2], strict=True):
        assert told["image"] == asked["image"]
        assert (data / "images" / told["image"]).is_file()
        turn, caption = (part["value"] for part in told["conversations"])
        assert turn.strip() == "<image>"
        question, answer = (part["value"] for part in asked["conversations"])
        first, relation, second = split(caption)
        true = f"<image>\nIs {first} {relation} {second}?"
        false = f"<image>\nIs {second} {relation} {first}?"
        assert question == (true if answer == "yes" else false)
        answers.add(answer)
    assert answers == set(YES_NO)


def split(caption: str) -> tuple[str, str, str]:
    """The first drawing, the relation, and the second drawing of a caption."""
    relation = "above" if " above " in caption else "left of"
    first, second = caption.split(f" {relation} ")
    return first, relation, second


def test_a_scene_is_followed_by_its_twin_and_no_pair_was_shown(data) -> None:
    groups = read_json_value(data / "groups.json")
    # ten pairs, each in two relations and with a twin; the rest is left out
    assert [len(group) for group in groups] == [16, 16]
    shown = {
        row["conversations"][1]["value"]
        for row in read_json_value(data / "captions.json")[::2]
    }
    for group in groups:
        for scene, twin in zip(group[::2], group[1::2], strict=True):
            assert twin["id"] == scenes.twin_of(scene["id"])
            assert twin["family"] == scene["family"]
            assert scene_questions.exchanged(scene["name"]) == twin["name"]
            assert scene["name"] not in shown
            assert twin["name"] not in shown
    with pytest.raises(ValueError, match="'a cat' has none of the relations"):
        scene_questions.exchanged("a cat")


def test_too_few_scenes_are_refused(tmp_path) -> None:
    scenes.make_scenes(tmp_path / "all", scenes=4, concepts=6)
    with pytest.raises(ValueError, match="12 test scenes, fewer than 16"):
        scene_questions.write_data(tmp_path / "all", "test", tmp_path / "data")


def test_what_counts_is_what_the_picture_adds() -> None:
    # the model likes the second caption, whatever it sees, and prefers "no"
    liked = np.array([0.0, 5.0, 0.0, 0.0])
    captions = np.eye(4) + liked
    looking = {
        "captions": captions.tolist(),
        "yes": [[[-1.0, -3.0], [-3.0, -1.0]], [[-1.0, -3.0], [-0.5, -1.0]]],
    }
    scores = scene_questions.score([looking])
    assert scores["caption"] == pytest.approx(np.ones(4))
    assert scores["twins"].tolist() == [1.0, 1.0]
    # the last scene's picture prefers its twin's caption
    assert scores["yes_no"].tolist() == [1.0, 0.0]
    blind = {
        "captions": np.tile(liked, (4, 1)).tolist(),
        "yes": [[[1.0, 1.0], [1.0, 1.0]]] * 2,
    }
    scores = scene_questions.score([blind])
    assert scores["caption"] == pytest.approx(np.full(4, 0.5))
    assert scores["twins"].tolist() == [0.0, 0.0]
    assert scores["yes_no"].tolist() == [0.0, 0.0]


def test_answers_that_are_there_are_compared(data, tmp_path) -> None:
    (tmp_path / "data").symlink_to(data)
    groups = read_json_value(data / "groups.json")
    rng = np.random.default_rng(0)
    for seed in (0, 1):
        # pictures tell their captions, to one arm more than to the other
        for arm, strength in (("permuted", 0.2), ("tuned", 9.0)):
            answers = []
            for group in groups:
                noise_NN = rng.normal(size=(len(group), len(group)))
                score_NN = noise_NN + strength * np.eye(len(group))
                odds = rng.normal(size=(len(group) // 2, 2, 2)) + strength * np.eye(2)
                answers.append({"captions": score_NN.tolist(), "yes": odds.tolist()})
            folder = tmp_path / f"{arm}-seed{seed}"
            folder.mkdir()
            (folder / "log_likelihoods.json").write_text(json.dumps(answers))
    table = scene_questions.run(
        data.parent / "all",
        tmp_path / "towers",
        tmp_path / "llm",
        tmp_path,
        arms=("permuted", "tuned"),
        seeds=(0, 1),
        steps=1,
    )
    record = read_json_value(tmp_path / "questions.json")
    assert record["means"]["tuned-seed0"]["caption"] > 0.9
    compared = [
        (row["score"], row["base"], row["new"]) for row in record["comparisons"]
    ]
    assert compared == [
        (score, "permuted", "tuned") for score in ("caption", "twins", "yes_no")
    ]
    assert all(row["difference"] > 0.3 for row in record["comparisons"])
    assert "| fine-tuned LLM | 2 |" in table
    assert "| twins by yes or no | fine-tuned LLM minus" in table
