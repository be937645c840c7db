"""Files from elsewhere (scores, towers, question files, language models) reach nothing but what they are about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_llm import tiny_tokenizer

from llava_integration.answer.questions import Question
from llava_integration.compare.command import main as compare
from llava_integration.preflight import check_language
from llm2clip_plugin.contracts import ScoreFile, sha256_text

HOSTILE = 'x"/><meta http-equiv="refresh" content="0;url=//elsewhere">\x1b[2Jx'


def pictures_of(page: Path) -> dict[str, str]:
    return json.loads(page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])["images"]


def test_a_score_file_brings_no_markup_no_escape_and_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, page = tmp_path / "home", tmp_path / "out" / "compare.html"
    private.mkdir()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(private / "me.png")
    for name, scores in (("one", (0, 1)), ("two", (1, 1))):
        about = {"image": "me.png", "answer": "a", "question": "q", "category": "c"}
        items = [{"id": i, "score": score, "cluster": str(i), **about} for i, score in enumerate(scores * 5)]
        for benchmark in (HOSTILE, "pope"):
            ScoreFile(
                benchmark=benchmark,
                metrics={"accuracy": sum(scores) / 2},
                items=items,
                model=f"{name}\x1b]0;owned\x07",
                provenance={"data": str(private), "data_sha256": sha256_text("")},
            ).write(tmp_path / name / f"{benchmark[:1]}.scores.json")
    command = [str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(page.parent), "--resamples", "100"]
    assert compare(command) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed
    text = page.read_text(encoding="utf-8")
    assert '<meta http-equiv="refresh' not in text
    assert "form-action &#39;none&#39;" in text and "base-uri &#39;none&#39;" in text
    assert pictures_of(page) == {}
    assert compare([*command, "--image-folder", str(private)]) == 0 and pictures_of(page)


@pytest.mark.parametrize("name", ["../secret.png", "{folder}/secret.png", "a/../../secret.png"])
def test_a_question_reaches_no_picture_outside_the_image_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for path in ("secret.png", "images/inside.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / path)
    folder = str(tmp_path / "images")
    for inside in ("inside.png", f"{folder}/inside.png"):
        assert Question(id=1, text="", shown="", image=inside).open_image(folder).size == (8, 8)
    with pytest.raises(ValueError, match=r"question 7: image '.*secret\.png' is outside --image-folder"):
        Question(id=7, text="", shown="", image=name.format(folder=tmp_path)).open_image(folder)
    assert Question(id=1, text="", shown="", image=f"{tmp_path}/secret.png").open_image("/").size == (8, 8)


@pytest.mark.parametrize(
    ("kind", "unk", "says"),
    [("llama", "<pad>", ""), ("mistral", "<pad>", ""), ("qwen2", "<pad>", "'qwen2'"), ("llama", None, "unk_token")],
)
def test_language_models_that_llava_cannot_train(kind: str, unk: str | None, says: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = unk
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    problems = list(check_language(tmp_path))
    assert len(problems) == bool(says) and all(says in problem for problem in problems)
