"""Files from elsewhere (scores, towers, question files, language models) reach nothing but what
they are about."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_llm import tiny_tokenizer

from llava_integration.evaluator.answer.questions import Question
from llava_integration.plug.preflight import check_language


@pytest.mark.parametrize(
    "name", ["../secret.png", "{folder}/secret.png", "a/../../secret.png"]
)
def test_a_question_reaches_no_picture_outside_the_image_folder(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for path in ("secret.png", "images/inside.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / path)
    folder = str(tmp_path / "images")
    for inside in ("inside.png", f"{folder}/inside.png"):
        assert Question(id=1, text="", prompt="", image=inside).open_image(
            folder
        ).size == (8, 8)
    with pytest.raises(
        ValueError, match=r"question 7: image '.*secret\.png' is outside --image-folder"
    ):
        Question(
            id=7, text="", prompt="", image=name.format(folder=tmp_path)
        ).open_image(folder)
    assert Question(
        id=1, text="", prompt="", image=f"{tmp_path}/secret.png"
    ).open_image("/").size == (8, 8)


@pytest.mark.parametrize(
    ("kind", "unk", "says"),
    [
        ("llama", "<pad>", ""),
        ("mistral", "<pad>", ""),
        ("qwen2", "<pad>", "'qwen2'"),
        ("llama", None, "unk_token"),
    ],
)
def test_language_models_that_llava_cannot_train(
    kind: str, unk: str | None, says: str, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = unk
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    problems = list(check_language(tmp_path))
    assert len(problems) == bool(says)
    assert all(says in problem for problem in problems)
