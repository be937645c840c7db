#!/usr/bin/env python3
"""Data and scores of the LLaVA miniature, in an environment that has LLaVA; and a side of it
trained without LLaVA.

    miniature.py prepare --output DIR --llm NAME
    miniature.py train NAME --tower TOWER --output DIR
    miniature.py score NAME... --output DIR

``prepare``: pictures, texts, captions, questions; the language model. ``train``: a model of
`llm2clip vlm build`, as miniature.sh's SmolLM2. ``score``: scores of DIR/NAME.answers.jsonl, for
`llm2clip compare`.

A NAME is before or after; with -seedN, of another seed. ``train`` uses transformers' Trainer alone.
It writes DIR/vlm-NAME/stage0 (built), stage1 (projector, captions), stage2 (projector and LoRA,
conversations), and the answers.

Questions are about the group of an emoji (nine answers) and, from easy-vqa, a colored shape
(thirteen answers, half of them yes or no); a language model other than tiny is also asked for the
name of an emoji, scored by a word of its name or keywords, and by the cosine of answer and name in
a teacher's embeddings. Emoji of the test families and easy-vqa's test pictures are held out;
--held-out validation: emoji of the validation families, to choose settings.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from inputs import EMOJI, Sample, folder_of, make_llava_llm, read_tar

from llava_integration.evaluator.benchmarks.answers import read_jsonl
from llava_integration.serve.rows import LlavaRows
from llm2clip_plugin.atomic import atomic_directory, write_text
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.hashes import sha256_file

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
CLOSED = ("emoji group", "easy-vqa")
OPEN = "emoji name"
EMPTY = frozenset(
    "a an and at by for from in into it of off on or over the to up with without".split()
)
# whose options are kept
STAGES = (
    "llava-{}-pretrain",
    "llava-{}",
    "llava-lora-{}",
    "vlm-{}/stage1",
    "vlm-{}/stage2",
)
MODELS = {
    "tiny": "a language model of 2.5 million weights, trained from scratch",
    "smollm2": "SmolLM2-135M-Instruct",
}
OF_TOWER = (
    "--vision_tower",
    "--pretrain_mm_mlp_adapter",
)  # options that differ between the sides
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
    chosen = sorted({image for _, _, image in questions})
    if pictures is not None:
        chosen = draw.sample(chosen, min(pictures, len(chosen)))
    is_chosen = set(chosen)
    yes_or_no: list[int] = []
    others: list[int] = []
    for number, (_, answer, image) in enumerate(questions):
        if image not in is_chosen:
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


def make_data(output: Path, concepts: int, *, in_words: bool, split: str) -> None:
    """Write everything that the stages read, atomically; the held-out emoji are those of ``split``.
    ``in_words``: for a larger model, whose step costs by its tokens. Emoji are named, too, and a
    picture's questions are one conversation.
    """
    pictures = emoji("train")
    names = sorted({about["concept"] for _, _, about in pictures})
    chosen = set(
        random.Random(0).sample(names, min(concepts or len(names), len(names)))
    )
    fraction = len(chosen) / len(
        names
    )  # the same of the shapes, so that a smoke run is short
    shapes = int(SHAPES_TRAIN * fraction)
    text = []
    captions = []
    questions = []
    with atomic_directory(output, replace=True) as temporary:
        images = temporary / "images"
        images.mkdir()
        for key, png, about in pictures:
            if about["concept"] not in chosen:
                continue
            (images / f"{key}.png").write_bytes(png)
            english = about["english"]
            picture = f"{key}.png"
            if about["style"] == "noto":  # the text does not depend on the style
                text.append(talk(key, f"{GROUP} {english['short']}", about["group"]))
                text.append(
                    talk(
                        f"{key}-long",
                        f"Describe it: {english['short']}",
                        english["long"],
                    )
                )
            captions.append(talk(key, "What is it?", english["short"], picture))
            questions.append(talk(key, GROUP, about["group"], picture))
            if in_words:
                questions.append(talk(f"{key}-name", NAME, english["short"], picture))
        drawn = easy_vqa("train", shapes, shapes // TURNS if in_words else None)
        for number, (key, path, question, answer) in enumerate(drawn):
            (images / f"train-{path.name}").write_bytes(path.read_bytes())
            questions.append(talk(key, question, answer, f"train-{path.name}"))
            if (
                number % 10 == 0
            ):  # the words of the questions and answers, without the pictures
                text.append(talk(f"{key}-text", question, answer))
        with (temporary / "questions.jsonl").open("w") as file:
            for row in hold_out(images, split, in_words=in_words, smoke=fraction < 0.5):
                print(json.dumps(row, ensure_ascii=False), file=file)
        finetune = conversations(questions) if in_words else questions
        for name, rows in (
            ("text", text),
            ("captions", captions),
            ("finetune", finetune),
        ):
            (temporary / f"{name}.json").write_text(
                json.dumps(rows, ensure_ascii=False)
            )


def hold_out(images: Path, split: str, *, in_words: bool, smoke: bool) -> Iterator[Row]:
    """The questions of the evaluation, of each kind of score; their pictures are written to
    ``images``."""
    styles: dict[str, int] = {}
    for number, (key, png, about) in enumerate(emoji(split)):
        of_style = styles[about["style"]] = styles.get(about["style"], -1) + 1
        # a smoke run uses one in ten; words take time, so each emoji once, every style as often
        if (smoke and number % 10) or (in_words and of_style % 3 != len(styles) - 1):
            continue
        (images / f"{key}.png").write_bytes(png)
        row = {
            "question_id": key,
            "image": f"{key}.png",
            "concept": about["concept"],
            "cluster": about["family"],  # whose members are right or wrong together
            "category": about["group"],
        }
        yield {**row, "text": GROUP, "truth": about["group"], "kind": CLOSED[0]}
        if in_words:
            row |= {"question_id": f"{key}-name", "keywords": about["keywords"]}
            yield {
                **row,
                "text": NAME,
                "truth": about["english"]["short"],
                "kind": OPEN,
            }
    if split != "test":
        return
    for key, path, question, answer in easy_vqa(
        "test", SHAPES_TEST // 10 if smoke else SHAPES_TEST
    ):
        (images / f"test-{path.name}").write_bytes(path.read_bytes())
        row = {
            "question_id": key,
            "image": f"test-{path.name}",
            "text": question,
            "truth": answer,
        }
        yield {
            **row,
            "kind": CLOSED[1],
            "cluster": path.name,
            "category": CATEGORIES.get(answer, "colour"),
        }


def train_side(output: Path, name: str, tower: str, steps: tuple[int, int]) -> None:
    """Build, train and answer; what is finished stays. ``steps``: on captions, on conversations."""
    from llava_integration.serve.build import register
    from llm2clip_plugin.cli import main as llm2clip

    seed = name.partition("-seed")[2] or "0"
    data = output / "data"
    stages = [output / f"vlm-{name}" / f"stage{stage}" for stage in range(3)]
    words = [
        "--tower",
        tower,
        "--llm",
        str(output / "llm"),
        "--output",
        str(stages[0]),
        "--seed",
        seed,
    ]
    if not stages[0].exists() and (status := llm2clip(["vlm", "build", *words])):
        sys.exit(status)
    register()
    for number, (file, batch) in enumerate((("captions", 16), ("finetune", 8))):
        settings = {
            "max_steps": steps[number],
            "per_device_train_batch_size": batch,
            "seed": int(seed),
        }
        if not stages[number + 1].exists():
            train_stage(
                stages[number],
                stages[number + 1],
                data / f"{file}.json",
                lora=number == 1,
                **settings,
            )
    if not (answers := output / f"{name}.answers.jsonl").exists():
        answer(stages[2], data / "questions.jsonl", answers)


def train_stage(
    source: Path, output: Path, data: Path, *, lora: bool, **settings: Any
) -> None:
    """A stage: the projector alone, or with LoRA, which is merged into the LLM."""
    from peft import LoraConfig, get_peft_model

    rows = LlavaRows(
        transformers.AutoProcessor.from_pretrained(source, trust_remote_code=False),
        data.parent / "images",
    )
    model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(
        source, dtype=torch.float32
    )
    model.requires_grad_(False).model.multi_modal_projector.requires_grad_(True)
    torch.manual_seed(settings["seed"])
    parts: Any = {
        "target_modules": r".*language_model\.layers.*_proj",
        "modules_to_save": ["multi_modal_projector"],
    }
    trained: Any = (
        get_peft_model(model, LoraConfig(r=64, lora_alpha=128, **parts))
        if lora
        else model
    )
    fixed: dict[str, Any] = {
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "bf16": True,
    }
    fixed |= {
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 10,
        "save_strategy": "no",
    }
    with atomic_directory(output) as folder:
        arguments = transformers.TrainingArguments(
            str(folder), remove_unused_columns=False, **fixed, **settings
        )
        trainer = transformers.Trainer(
            trained, arguments, rows, json.loads(data.read_text())
        )
        trainer.train()
        trainer.save_state()
        (trained.merge_and_unload() if lora else model).save_pretrained(folder)
        rows.processor.save_pretrained(folder)
    # compared with the other side's
    output.with_suffix(".options").write_text("\n".join(map(str, settings.items())))


@torch.inference_mode()
def answer(folder: Path, questions: Path, output: Path) -> None:
    """Greedy answers, 64 at a time."""
    rows = LlavaRows(
        transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False),
        questions.parent / "images",
    )
    model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16
    ).eval()
    answers = ""
    all_questions = read_jsonl(questions)
    for start in range(0, len(all_questions), 64):
        some = all_questions[start : start + 64]
        chats = [
            rows.chat(
                {**row, "conversations": [{"from": "human", "value": row["text"]}]}
            )
            for row in some
        ]
        inputs = rows.encode(chats, side="left", add_generation_prompt=True).to(
            torch.bfloat16
        )
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answer_ids = ids[:, inputs["input_ids"].shape[1] :]
        texts = rows.processor.batch_decode(answer_ids, skip_special_tokens=True)
        for row, text in zip(some, texts, strict=True):
            answers += (
                json.dumps({"question_id": row["question_id"], "text": text}) + "\n"
            )
    write_text(output, answers)


def options_but_tower(path: Path) -> list[str]:
    """A stage's options, one a line in its file, without the values of OF_TOWER."""
    words = path.read_text().splitlines()
    return [word for option, word in pairwise(["", *words]) if option not in OF_TOWER]


def refuse_other_stages(output: Path, after: str) -> None:
    """Raise ValueError if a stage of ``after`` or ``after-seedN`` had other options than before's,
    the tower aside."""
    trained = [
        stage
        for stage in STAGES
        if (output / f"{stage.format(after)}.options").exists()
    ]
    for stage in trained or STAGES[:1]:
        base = output / f"{stage.format(after.replace('after', 'before'))}.options"
        new = output / f"{stage.format(after)}.options"
        if options_but_tower(base) != options_but_tower(new):
            raise ValueError(
                f"{base} and {new} differ: the two sides were not trained alike; delete {output}"
            )


def score(output: Path, name: str, note: str, teacher: Any) -> None:
    """Write a file for each kind of question to ``DIR/scores/NAME``, and print a line of each.
    ``side-seedN`` goes to ``DIR/scores/side/seedN``: ``llm2clip compare`` takes the files below
    ``side`` for its runs."""
    path = output / "data" / "questions.jsonl"
    answer_to: dict[str, str] = {}
    for row in read_jsonl(output / f"{name}.answers.jsonl"):
        answer_to[row["question_id"]] = row["text"].strip()
    of_kind: dict[str, list[Row]] = {}
    for row in read_jsonl(path):
        answered = {**row, "answer": answer_to[row["question_id"]]}
        of_kind.setdefault(row["kind"], []).append(answered)
    results: list[ScoreFile] = []
    for kind in CLOSED:
        if kind in of_kind:
            results.append(closed(kind, of_kind[kind], guesses(output)))
    if OPEN in of_kind:
        results.append(by_keyword(of_kind[OPEN]))
        if teacher:
            results.append(by_similarity(of_kind[OPEN], teacher))
    side, _, seed = name.partition("-")
    provenance = {
        "data": str(output / "data" / "images"),
        "data_sha256": sha256_file(path),
    }
    for result in results:
        scored = replace(
            result, model=side, notes=[note, *result.notes], provenance=provenance
        )
        file = (
            result.benchmark.removeprefix("miniature: ")
            .replace(", ", "-")
            .replace(" ", "-")
        )
        scored.write(output / "scores" / side / seed / f"{file}.scores.json")
        reached = next(iter(result.metrics.values()))
        score_text = f"{reached:5.1f} % of {len(result.items)} ({result.notes[-1]})"
        print(f"{name:>8}  {result.benchmark:31} {score_text}")


def closed(kind: str, rows: list[Row], guessed: dict[str, str]) -> ScoreFile:
    """The accuracy of exact answers; ``guessed``: question -> what a model that ignores the picture
    would say."""
    right = [float(row["answer"].lower() == row["truth"].lower()) for row in rows]
    blind = (
        100 * sum(guessed.get(row["text"]) == row["truth"] for row in rows) / len(rows)
    )
    note = f"without the picture, by the most frequent answer to the same question: {blind:.1f} %"
    metrics = {"accuracy": 100 * sum(right) / len(right), "without_looking": blind}
    return record(kind, rows, right, metrics, note)


def guesses(output: Path) -> dict[str, str]:
    """Question -> its most frequent answer in training: what a model that ignores the picture would
    say."""
    counts: dict[str, Counter[str]] = {}
    for row in json.loads((output / "data" / "finetune.json").read_text()):
        said = [
            turn["value"].removeprefix("<image>\n") for turn in row["conversations"]
        ]
        for question, answer in zip(said[::2], said[1::2], strict=True):
            counts.setdefault(question, Counter())[answer] += 1
    return {
        question: answers.most_common(1)[0][0] for question, answers in counts.items()
    }


def words_of(text: str) -> set[str]:
    """The words of a text that say something."""
    return set(re.findall(r"[^\W\d_]+", text.lower())) - EMPTY


def by_keyword(rows: list[Row]) -> ScoreFile:
    """Whether an answer has a word of the emoji's name or keywords."""
    truths = [words_of(" ".join([row["truth"], *row["keywords"]])) for row in rows]
    hits = []
    for row in rows:
        said = words_of(row["answer"])
        hits.append([not truth.isdisjoint(said) for truth in truths])
    return against_exchanged(
        "word of the name or a keyword", f"{OPEN}, keyword", rows, hits
    )


def by_similarity(rows: list[Row], teacher: Any) -> ScoreFile:
    """The cosine of answer and name in the teacher's embeddings; 0 for an empty answer and for
    less."""
    answers = teacher.encode([row["answer"] or "?" for row in rows])
    names = teacher.encode([row["truth"] for row in rows])
    answer_ND = torch.nn.functional.normalize(answers, dim=-1)
    name_ND = torch.nn.functional.normalize(names, dim=-1)
    cosine_NN = (answer_ND @ name_ND.T).clamp(min=0).numpy()
    cosine_NN[[row["answer"] == "" for row in rows]] = 0
    return against_exchanged(
        "cosine with the name", f"{OPEN}, teacher", rows, cosine_NN
    )


def against_exchanged(
    metric: str, kind: str, rows: list[Row], scores: Any
) -> ScoreFile:
    """``scores``: answers x pictures. An answer scores the points that its own picture is above
    those of other emoji: what comes from the picture. A model which always says the same scores 0,
    however often it is right."""
    point_NN = 100 * np.array(scores, dtype=np.float64)
    concept_N = np.array([row["concept"] for row in rows])
    other_NN = concept_N[:, None] != concept_N
    own_N = point_NN.diagonal()
    exchanged_N = (point_NN * other_NN).sum(1) / np.maximum(1, other_NN.sum(1))
    reached = float(own_N.mean())
    by_chance = float(exchanged_N.mean())
    metrics = {
        metric.replace(" ", "_"): reached,
        "pictures_exchanged": by_chance,
        "above": reached - by_chance,
    }
    note = f"{metric}; with the pictures exchanged: {by_chance:.1f} %"
    return record(kind, rows, (own_N - exchanged_N).tolist(), metrics, note)


def record(
    kind: str,
    rows: list[Row],
    scores: list[float],
    metrics: dict[str, float],
    note: str,
) -> ScoreFile:
    """A score file whose items are ``rows`` with ``scores``."""
    items = []
    for row, value in zip(rows, scores, strict=True):
        item = {"id": row["question_id"], "question": row["text"], "score": value}
        for field in ("cluster", "category", "answer", "truth", "image"):
            item[field] = row[field]
        items.append(item)
    counts = {
        "questions": len(items),
        "clusters": len({item["cluster"] for item in items}),
    }
    return ScoreFile(
        benchmark=f"miniature: {kind}",
        metrics=metrics,
        items=items,
        counts=counts,
        notes=[note],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("prepare", "train", "score"))
    parser.add_argument("names", nargs="*", help="of the sides, for train and score")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--concepts", type=int, default=0, help="training emoji; 0: all 1,068"
    )
    parser.add_argument(
        "--llm", default="tiny", help="language model: tiny, smollm2 or a directory"
    )
    parser.add_argument(
        "--held-out",
        choices=("test", "validation"),
        default="test",
        help="families of the emoji",
    )
    parser.add_argument("--tower", help="directory of a tower, for train")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=2,
        default=(120, 100),
        metavar="N",
        help="captions, conversations",
    )
    parser.add_argument("--teacher", type=Path, help="an LLM that scores open answers")
    parser.add_argument("--adapter", type=Path, help="adapter of the teacher")
    args = parser.parse_args()
    try:
        if args.part == "prepare":
            make_data(
                args.output / "data",
                args.concepts,
                in_words=args.llm != "tiny",
                split=args.held_out,
            )
            make_llava_llm(args.llm, args.output)
        teacher = None
        if args.teacher:
            from llm2clip_plugin.text.encoder import CaptionEncoder, EncoderConfig

            teacher = CaptionEncoder(
                EncoderConfig(llm=str(args.teacher), adapter=str(args.adapter or ""))
            )
        for name in args.names:
            if args.part == "train":
                train_side(args.output, name, args.tower, args.steps)
                continue
            if name.startswith("after"):
                refuse_other_stages(args.output, name)
            score(
                args.output,
                name,
                f"a miniature: {MODELS.get(args.llm, Path(args.llm).name)}",
                teacher,
            )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
