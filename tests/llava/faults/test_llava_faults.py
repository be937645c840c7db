"""Faults of a LLaVA checkpoint, its tower, a question file and its answers: one error, and no
answers."""

import re
import shutil

import pytest
from llava_world import untrained
from planted_faults import Fault, World, copied, flip, halve, meet, rows

pytestmark = [pytest.mark.usefixtures("home"), pytest.mark.both_stacks]
LLAVA = "llava-1"
TOWER = "towers/mine"


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """Towers, a checkpoint that LLaVA's code has built and saved with one of them, questions; and a
    copy of it all."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("faults") / "w"
    shutil.copytree(world.towers["clip"], folder / TOWER)
    untrained(world, f"llm2clip:{folder / TOWER}", folder / LLAVA)
    AutoTokenizer.from_pretrained(world.llm, use_fast=False).save_pretrained(
        folder / LLAVA
    )
    shutil.copytree(world.images, folder / "images")
    lines = world.questions.read_text().splitlines(keepends=True)
    (folder / "questions.jsonl").write_text("".join(lines[:3]))
    shutil.copytree(folder, folder.with_name("copy"))
    return World(folder), folder.with_name("copy")


@pytest.fixture
def planted(made):
    """The world as it was made, under the paths that the checkpoint has recorded."""
    world, copy = made
    shutil.rmtree(world.folder)
    return copied(copy, world.folder)


def answering(world: World, words: str = "") -> list[str]:
    """``llava evaluate``; ``words`` come last and take precedence."""
    command = (
        "llava evaluate --model-path {w}/llava-1 --question-file {w}/questions.jsonl "
        "--image-folder {w}/images "
    )
    command += (
        "--answers-file {w}/answers.jsonl --max-new-tokens 2 --workers 0 --device cpu --dtype "
        "float32 "
    ) + words
    return command.replace("{w}", str(world.folder)).split()


TENSORS = "model.safetensors"


@rows(
    Fault(
        "flipped byte of a tower",
        "",
        "{w}/towers/...SHA-256 ...",
        lambda w: flip(w.path(TOWER) / TENSORS),
    ),
    Fault(
        "no checkpoint",
        "--model-path {w}/llava-2",
        "--model-path {w}/llava-2 is neither a folder nor a Hub id...",
    ),
    Fault(
        "half-copied weights",
        "",
        "{w}/llava-1/model.safetensors...",
        lambda w: halve(w.path(LLAVA) / TENSORS),
    ),
    Fault(
        "a language model alone",
        "",
        "--model-path {w}/llava-1 has no mm_vision_tower in its config.json...",
        lambda w: w.path(f"{LLAVA}/config.json").write_text('{"model_type": "llama"}'),
    ),
    Fault(
        "unknown conversation", "--conv-mode vicuna", "unknown --conv-mode 'vicuna'..."
    ),
)
def test_checkpoint_and_tower(fault, planted, capsys):
    output = meet(fault, planted, answering(planted, fault.words), capsys)
    assert not planted.path("answers.jsonl").exists()
    assert not re.search(r"LOAD REPORT|Loading weights", output), output


def questions(name, text, says):
    """Another question file."""
    return Fault(name, "", says, lambda w: w.path("questions.jsonl").write_text(text))


ROW = '{"question_id": 1, "text": "What?", "image": "%s"}\n'


@rows(
    questions(
        "no such image",
        ROW % "nowhere.png",
        "question 1: ...{w}/images/nowhere.png: ...",
    ),
    questions(
        "a text that is none",
        '{"question_id": 1, "text": 5}\n',
        "{w}/questions.jsonl, line 1 ...",
    ),
    questions(
        "an image elsewhere",
        ROW % "../questions.jsonl",
        "question 1: image '../questions.jsonl' ...",
    ),
)
def test_questions(fault, planted, capsys):
    meet(fault, planted, answering(planted, fault.words), capsys)
    assert not planted.path("answers.jsonl").exists()
