#!/usr/bin/env python3
"""Data, language model and scores of the LLaVA miniature. Runs in an environment that has LLaVA.

    miniature.py prepare --output DIR --llm NAME    pictures, texts, captions, questions; the language model
    miniature.py score NAME... --output DIR         scores of DIR/NAME.answers.jsonl, for `llm2clip compare`

Questions are about the group of an emoji (nine answers) and, from easy-vqa, a colored shape (thirteen answers, half
of them yes or no); with --open, also about the name of an emoji, answered in words. Emoji of unseen families and
easy-vqa's test pictures are held out; --held-out validation: emoji of the validation families, to choose settings on.
"""

# easy-vqa is installed by miniature.sh:
# pyright: reportMissingImports=false

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miniature_llm import describe, make_llm
from miniature_scores import CLOSED, OPEN, Teacher, refuse_other_stages, score
from shards import EMOJI, read_tar

from llm2clip_plugin.contracts import atomic_directory

GROUP, NAME = "Which group does the emoji belong to?", "What does the emoji show?"
SHAPES_TRAIN, SHAPES_TEST = 4800, 600  # of easy-vqa's 38,575 and 9,673 questions
TURNS = 4  # of a conversation


def emoji(split: str) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """(key, PNG, description) of a split's pictures in every style."""
    for shard in sorted(EMOJI.glob(f"{split}-*.tar")):
        yield from read_tar(shard)


def easy_vqa(split: str, count: int, pictures: int | None = None) -> list[tuple[str, Path, str, str]]:
    """(id, picture, question, answer) of ``count`` questions in a fixed random selection, half of them yes or no.

    ``pictures``: about so many pictures, instead of any.
    """
    import easy_vqa

    folder = Path(str(easy_vqa.__file__)).parent / "data" / split
    questions = json.loads((folder / "questions.json").read_text())
    draw = random.Random(0)
    shown = sorted({image for _, _, image in questions})
    chosen = set(shown if pictures is None else draw.sample(shown, min(pictures, len(shown))))
    places = [place for place, (_, _, image) in enumerate(questions) if image in chosen]
    closed = [place for place in places if questions[place][1] in ("yes", "no")]
    others = [place for place in places if questions[place][1] not in ("yes", "no")]
    drawn = draw.sample(closed, count // 2) + draw.sample(others, count - count // 2)
    found = []
    for place in sorted(drawn):
        question, answer, image = questions[place]
        found.append((f"shape-{place}", folder / "images" / f"{image}.png", question, answer))
    return found


def kind_of(answer: str) -> str:
    """The kind of an easy-vqa question, by its answer."""
    if answer in ("yes", "no"):
        return "yes or no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "colour"


def talk(question: str, answer: str, *, picture: bool) -> list[dict[str, str]]:
    """One turn in LLaVA's format."""
    text = f"<image>\n{question}" if picture else question
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def conversations(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions about the same picture as turns of one conversation, as in LLaVA 1.5's own data; at most ``TURNS``."""
    of_picture: dict[str, list[dict[str, Any]]] = {}
    for row in questions:
        of_picture.setdefault(row["image"], []).append(row)
    made = []
    for rows in of_picture.values():
        for start in range(0, len(rows), TURNS):
            first, *others = rows[start : start + TURNS]
            turns = [
                {**turn, "value": turn["value"].removeprefix("<image>\n")}
                for row in others
                for turn in row["conversations"]
            ]
            made.append({**first, "conversations": [*first["conversations"], *turns]})
    return made


def english(about: dict[str, Any]) -> dict[str, str]:
    """kind of caption -> text."""
    return {caption["kind"]: caption["text"] for caption in about["captions"] if caption["language"] == "en"}


def make_data(output: Path, concepts: int, *, open_questions: bool, merged: bool, split: str) -> None:
    """Write everything that the stages read, atomically; the held-out emoji are those of ``split``.

    ``merged``: questions about a picture are one conversation.
    """
    concept_names = sorted({about["concept"] for _, _, about in emoji("train")})
    count = min(concepts or len(concept_names), len(concept_names))
    chosen = set(random.Random(0).sample(concept_names, count))
    fraction = len(chosen) / 1068  # the same of the shapes, so that a smoke run is short
    shapes = int(SHAPES_TRAIN * fraction)
    with atomic_directory(output, replace=True) as temporary:
        images = temporary / "images"
        images.mkdir()
        text, captions, questions = [], [], []
        for key, png, about in emoji("train"):
            if about["concept"] not in chosen:
                continue
            (images / f"{key}.png").write_bytes(png)
            names = english(about)
            if about["style"] == "noto":  # the text does not depend on the style
                turn = talk(f"{GROUP} {names['short']}", about["group"], picture=False)
                text.append({"id": key, "conversations": turn})
                turn = talk(f"Describe it: {names['short']}", names["long"], picture=False)
                text.append({"id": f"{key}-long", "conversations": turn})
            picture = {"id": key, "image": f"{key}.png"}
            captions.append({**picture, "conversations": talk("What is it?", names["short"], picture=True)})
            questions.append({**picture, "conversations": talk(GROUP, about["group"], picture=True)})
            if open_questions:
                turn = talk(NAME, names["short"], picture=True)
                questions.append({**picture, "id": f"{key}-name", "conversations": turn})
        for number, (key, path, question, answer) in enumerate(
            easy_vqa("train", shapes, shapes // TURNS if merged else None)
        ):
            (images / f"train-{path.name}").write_bytes(path.read_bytes())
            turn = talk(question, answer, picture=True)
            questions.append({"id": key, "image": f"train-{path.name}", "conversations": turn})
            if number % 10 == 0:  # the words of the questions and answers, without the pictures
                text.append({"id": f"{key}-text", "conversations": talk(question, answer, picture=False)})
        if merged:
            questions = conversations(questions)
        held_out = list(hold_out(images, split, open_questions=open_questions, smoke=fraction < 0.5))
        for name, rows in (("text", text), ("captions", captions), ("finetune", questions)):
            (temporary / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False))
        (temporary / "questions.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in held_out)
        )
    print(
        f"{output}: {len(text)} texts, {len(captions)} captions, {len(questions)} questions, {len(held_out)} held out"
    )


def hold_out(images: Path, split: str, *, open_questions: bool, smoke: bool) -> Iterator[dict[str, Any]]:
    """The questions of the evaluation, of each kind of score; their pictures are written to ``images``."""
    styles: dict[str, int] = {}
    for number, (key, png, about) in enumerate(emoji(split)):
        of_style = styles[about["style"]] = styles.get(about["style"], -1) + 1
        if number % 10 and smoke:  # a smoke run uses one in ten
            continue
        if open_questions and of_style % 3 != len(styles) - 1:  # each emoji once, every style as often: words take time
            continue
        (images / f"{key}.png").write_bytes(png)
        row = {"question_id": key, "image": f"{key}.png", "cluster": about["concept"], "category": about["group"]}
        yield {**row, "text": GROUP, "truth": about["group"], "kind": CLOSED[0]}
        if open_questions:
            row |= {"question_id": f"{key}-name", "keywords": about["keywords"]}
            yield {**row, "text": NAME, "truth": english(about)["short"], "kind": OPEN}
    if split != "test":
        return
    for key, path, question, answer in easy_vqa("test", SHAPES_TEST // 10 if smoke else SHAPES_TEST):
        (images / f"test-{path.name}").write_bytes(path.read_bytes())
        row = {"question_id": key, "image": f"test-{path.name}", "text": question, "truth": answer}
        yield {**row, "kind": CLOSED[1], "cluster": path.name, "category": kind_of(answer)}


def main() -> None:
    """Run one of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prepare", "score"))
    parser.add_argument("names", nargs="*", help="names of the answer files, for score")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--concepts", type=int, default=0, help="training emoji; 0: all 1,068")
    parser.add_argument("--llm", default="tiny", help="language model: tiny, smollm2 or a directory")
    parser.add_argument("--open", action="store_true", help="ask for names, too")
    parser.add_argument("--held-out", choices=("test", "validation"), default="test", help="emoji of the evaluation")
    parser.add_argument("--teacher", type=Path, help="an LLM that scores open answers")
    parser.add_argument("--adapter", type=Path, help="adapter of the teacher")
    options = parser.parse_args()
    if options.part == "prepare":
        merged = options.llm != "tiny"  # a step of a larger model costs by its tokens
        make_data(
            options.output / "data",
            options.concepts,
            open_questions=options.open,
            merged=merged,
            split=options.held_out,
        )
        make_llm(options.llm, options.output)
    teacher = Teacher(options.teacher, options.adapter) if options.teacher else None
    for name in options.names:
        if name.startswith("after"):
            refuse_other_stages(options.output, name)
        score(options.output, name, describe(options.llm), teacher)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
