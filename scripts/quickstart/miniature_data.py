"""Data of the LLaVA miniature: pictures, texts, captions and questions, from the built-in emoji and
easy-vqa."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from build_models import folder_of
from inputs import EMOJI, Sample, read_tar

from llm2clip_plugin.atomic import atomic_directory

GROUP = "Which group does the emoji belong to?"
NAME = "What does the emoji show?"
# of easy-vqa's 38,575 and 9,673 questions
SHAPES_TRAIN = 4800
SHAPES_TEST = 600
YES_NO = ("yes", "no")
SHAPES = ("circle", "rectangle", "triangle")
CATEGORIES: dict[str, str] = {  # of answers; all others are colors
    **dict.fromkeys(YES_NO, "yes or no"),
    **dict.fromkeys(SHAPES, "shape"),
}
TURNS = 4  # of a conversation, at most
EMOJI_GROUP = "emoji group"
EASY_VQA = "easy-vqa"
CLOSED = (EMOJI_GROUP, EASY_VQA)
OPEN = "emoji name"
Row = dict[str, Any]  # a question; of held-out ones with its "answer"


def emoji(split: str) -> list[Sample]:
    """(key, PNG, description) of a split's pictures in every style; English captions by kind are
    ``english`` in it."""
    samples: list[Sample] = []
    for shard in sorted(EMOJI.glob(f"{split}-*.tar")):
        samples += read_tar(shard)
    for _, _, about in samples:
        english: dict[str, str] = {}
        for caption in about["captions"]:
            if caption["language"] == "en":
                english[caption["kind"]] = caption["text"]
        about["english"] = english
    return samples


def easy_vqa(
    split: str, count: int, pictures: int | None = None
) -> Iterator[tuple[str, Path, str, str]]:
    """(id, picture, question, answer) of ``count`` questions in a fixed random selection, half of
    them yes or no. ``pictures``: about so many pictures, instead of any."""
    folder = folder_of("easy_vqa") / "data" / split
    questions = json.loads((folder / "questions.json").read_text())
    draw = random.Random(0)
    images = sorted({image for _, _, image in questions})
    if pictures is not None:
        images = draw.sample(images, min(pictures, len(images)))
    chosen = set(images)
    yes_or_no: list[int] = []
    others: list[int] = []
    for number, (_, answer, image) in enumerate(questions):
        if image not in chosen:
            continue
        if answer in YES_NO:
            yes_or_no.append(number)
        else:
            others.append(number)
    half = count // 2
    numbers = draw.sample(yes_or_no, half)
    numbers += draw.sample(others, count - half)
    for number in sorted(numbers):
        question, answer, image = questions[number]
        yield f"shape-{number}", folder / "images" / f"{image}.png", question, answer


def talk(key: str, question: str, answer: str, picture: str = "") -> Row:
    """A sample of one turn in LLaVA's format; ``picture``: its file."""
    row: Row = {"id": key}
    if picture:
        row["image"] = picture
        question = f"<image>\n{question}"
    row["conversations"] = [
        {"from": "human", "value": question},
        {"from": "gpt", "value": answer},
    ]
    return row


def conversations(questions: list[Row]) -> list[Row]:
    """Questions about the same picture as turns of one conversation, as in LLaVA 1.5's own data; at
    most ``TURNS``."""
    of_picture: dict[str, list[Row]] = {}
    for row in questions:
        of_picture.setdefault(row["image"], []).append(row)
    records: list[Row] = []
    for rows in of_picture.values():
        for start in range(0, len(rows), TURNS):
            records.append(joined(rows[start : start + TURNS]))
    return records


def joined(rows: list[Row]) -> Row:
    """Rows of one picture as one conversation, which shows the picture once."""
    turns: list[dict[str, str]] = []
    for row in rows:
        for turn in row["conversations"]:
            text = turn["value"]
            if turns:
                text = text.removeprefix("<image>\n")
            turns.append({**turn, "value": text})
    return {**rows[0], "conversations": turns}


@dataclass
class TrainingRows:
    """What the stages are trained on, in LLaVA's format."""

    text: list[Row] = field(default_factory=list)  # without pictures
    captions: list[Row] = field(default_factory=list)
    questions: list[Row] = field(default_factory=list)

    def add_emoji(self, key: str, about: dict[str, Any], *, in_words: bool) -> None:
        """``about``: the emoji's description; its picture is ``key``.png."""
        group = about["group"]
        name = about["english"]["short"]
        picture = f"{key}.png"
        if about["style"] == "noto":  # the text does not depend on the style
            description = about["english"]["long"]
            self.text.append(talk(key, f"{GROUP} {name}", group))
            self.text.append(talk(f"{key}-long", f"Describe it: {name}", description))
        self.captions.append(talk(key, "What is it?", name, picture))
        self.questions.append(talk(key, GROUP, group, picture))
        if in_words:
            self.questions.append(talk(f"{key}-name", NAME, name, picture))


def make_data(output: Path, concepts: int, *, in_words: bool, split: str) -> None:
    """Write everything that the stages read, atomically; the held-out emoji are those of ``split``.
    ``in_words``: for a larger model, whose step costs by its tokens. Emoji are named, too, and a
    picture's questions are one conversation.
    """
    pictures = emoji("train")
    names = sorted({about["concept"] for _, _, about in pictures})
    count = min(concepts or len(names), len(names))
    chosen = set(random.Random(0).sample(names, count))
    # the same of the shapes, so that a smoke run is short
    fraction = len(chosen) / len(names)
    rows = TrainingRows()
    with atomic_directory(output, replace=True) as temporary:
        images = temporary / "images"
        images.mkdir()
        for key, png, about in pictures:
            if about["concept"] in chosen:
                (images / f"{key}.png").write_bytes(png)
                rows.add_emoji(key, about, in_words=in_words)
        shapes = int(SHAPES_TRAIN * fraction)
        drawn = easy_vqa("train", shapes, shapes // TURNS if in_words else None)
        for number, (key, path, question, answer) in enumerate(drawn):
            picture = f"train-{path.name}"
            (images / picture).write_bytes(path.read_bytes())
            rows.questions.append(talk(key, question, answer, picture))
            # the words of some questions and answers, without the pictures
            if number % 10 == 0:
                rows.text.append(talk(f"{key}-text", question, answer))
        with (temporary / "questions.jsonl").open("w") as file:
            for row in hold_out(images, split, in_words=in_words, smoke=fraction < 0.5):
                print(json.dumps(row, ensure_ascii=False), file=file)
        finetune = conversations(rows.questions) if in_words else rows.questions
        write_rows(temporary / "text.json", rows.text)
        write_rows(temporary / "captions.json", rows.captions)
        write_rows(temporary / "finetune.json", finetune)


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False))


def hold_out(images: Path, split: str, *, in_words: bool, smoke: bool) -> Iterator[Row]:
    """The questions of the evaluation, of each kind of score; their pictures are written to
    ``images``."""
    yield from questions_about_emoji(images, split, in_words=in_words, smoke=smoke)
    if split == "test":
        yield from questions_about_shapes(
            images, SHAPES_TEST // 10 if smoke else SHAPES_TEST
        )


def questions_about_emoji(
    images: Path, split: str, *, in_words: bool, smoke: bool
) -> Iterator[Row]:
    pictures_of: dict[str, int] = {}  # style -> how many came so far
    for number, (key, png, about) in enumerate(emoji(split)):
        style = about["style"]
        number_of_style = pictures_of.get(style, 0)
        pictures_of[style] = number_of_style + 1
        if smoke and number % 10:  # a smoke run uses one in ten
            continue
        # words take time, so each emoji once, every style as often
        if in_words and number_of_style % 3 != len(pictures_of) - 1:
            continue
        (images / f"{key}.png").write_bytes(png)
        row = {
            "question_id": key,
            "image": f"{key}.png",
            "concept": about["concept"],
            "cluster": about["family"],  # whose members are right or wrong together
            "category": about["group"],
        }
        yield {**row, "text": GROUP, "truth": about["group"], "kind": EMOJI_GROUP}
        if in_words:
            row["question_id"] = f"{key}-name"
            row["keywords"] = about["keywords"]
            name = about["english"]["short"]
            yield {**row, "text": NAME, "truth": name, "kind": OPEN}


def questions_about_shapes(images: Path, count: int) -> Iterator[Row]:
    for key, path, question, answer in easy_vqa("test", count):
        picture = f"test-{path.name}"
        (images / picture).write_bytes(path.read_bytes())
        yield {
            "question_id": key,
            "image": picture,
            "text": question,
            "truth": answer,
            "kind": EASY_VQA,
            "cluster": path.name,
            "category": CATEGORIES.get(answer, "colour"),
        }
