#!/usr/bin/env python3
"""Data, untrained language model and scores of the LLaVA miniature. Runs in an environment that has LLaVA.

    miniature.py prepare --output DIR [--concepts N]   pictures, text, captions, questions; a Llama of four layers with
                                                       random weights, and its tokenizer
    miniature.py score NAME... --output DIR            scores of DIR/NAME.answers.jsonl, for `llm2clip compare`

Questions are about the group of an emoji (nine answers) and, from easy-vqa, a colored shape (thirteen answers, half
of them yes or no). Emoji of unseen families and easy-vqa's test pictures are held out.
"""

# LLaVA is not part of the environment that is checked, easy-vqa is installed by miniature.sh:
# pyright: reportMissingImports=false

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards import EMOJI, read_tar

from llm2clip_plugin.contracts import ScoreFile, atomic_directory, sha256_file

GROUP = "Which group does the emoji belong to?"
SHAPES_TRAIN, SHAPES_TEST = 4800, 600  # of easy-vqa's 38,575 and 9,673 questions
# As in Vicuna's repository: no version of transformers saves files that all of them read.
# legacy: LLaVA masks the prompt by the number of tokens that this form of the tokenizer makes.
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sp_model_kwargs": {},
}
MINIATURE = "a miniature: a language model of 2.5 million weights, trained here from scratch"


def emoji(split: str) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """(key, PNG, description) of a split's pictures in every style."""
    for shard in sorted(EMOJI.glob(f"{split}-*.tar")):
        yield from read_tar(shard)


def easy_vqa(split: str, count: int) -> list[tuple[str, Path, str, str]]:
    """(id, picture, question, answer) of ``count`` questions in a fixed random selection, half of them yes or no."""
    import easy_vqa

    folder = Path(str(easy_vqa.__file__)).parent / "data" / split
    questions = json.loads((folder / "questions.json").read_text())
    closed = [place for place, (_, answer, _) in enumerate(questions) if answer in ("yes", "no")]
    others = [place for place, (_, answer, _) in enumerate(questions) if answer not in ("yes", "no")]
    draw = random.Random(0)
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


def make_data(output: Path, concepts: int) -> None:
    """Write everything that the stages read, atomically."""
    concept_names = sorted({about["concept"] for _, _, about in emoji("train")})
    count = min(concepts or len(concept_names), len(concept_names))
    chosen = set(random.Random(0).sample(concept_names, count))
    fraction = len(chosen) / 1068  # the same of the shapes, so that a smoke run is short
    with atomic_directory(output, replace=True) as temporary:
        images = temporary / "images"
        images.mkdir()
        text, captions, questions, held_out = [], [], [], []
        for key, png, about in emoji("train"):
            if about["concept"] not in chosen:
                continue
            (images / f"{key}.png").write_bytes(png)
            names = {caption["kind"]: caption["text"] for caption in about["captions"] if caption["language"] == "en"}
            if about["style"] == "noto":  # the text does not depend on the style
                text.append(
                    {"id": key, "conversations": talk(f"{GROUP} {names['short']}", about["group"], picture=False)}
                )
                turn = talk(f"Describe it: {names['short']}", names["long"], picture=False)
                text.append({"id": f"{key}-long", "conversations": turn})
            picture = {"id": key, "image": f"{key}.png"}
            captions.append({**picture, "conversations": talk("What is it?", names["short"], picture=True)})
            questions.append({**picture, "conversations": talk(GROUP, about["group"], picture=True)})
        for number, (key, path, question, answer) in enumerate(easy_vqa("train", int(SHAPES_TRAIN * fraction))):
            (images / f"train-{path.name}").write_bytes(path.read_bytes())
            turn = talk(question, answer, picture=True)
            questions.append({"id": key, "image": f"train-{path.name}", "conversations": turn})
            if number % 10 == 0:  # the words of the questions and answers, without the pictures
                text.append({"id": f"{key}-text", "conversations": talk(question, answer, picture=False)})
        for number, (key, png, about) in enumerate(emoji("test")):
            if number % 10 and fraction < 0.5:  # a smoke run uses one in ten
                continue
            (images / f"{key}.png").write_bytes(png)
            row = {"question_id": key, "image": f"{key}.png", "text": GROUP, "truth": about["group"]}
            held_out.append({**row, "kind": "emoji group", "cluster": about["concept"], "category": about["group"]})
        for key, path, question, answer in easy_vqa("test", SHAPES_TEST if fraction > 0.5 else SHAPES_TEST // 10):
            (images / f"test-{path.name}").write_bytes(path.read_bytes())
            row = {"question_id": key, "image": f"test-{path.name}", "text": question, "truth": answer}
            held_out.append({**row, "kind": "easy-vqa", "cluster": path.name, "category": kind_of(answer)})
        for name, rows in (("text", text), ("captions", captions), ("finetune", questions)):
            (temporary / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False))
        (temporary / "questions.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in held_out)
        )
    print(
        f"{output}: {len(text)} texts, {len(captions)} captions, {len(questions)} questions, {len(held_out)} held out"
    )


def make_tokenizer(output: Path, folder: Path) -> int:
    """Write a tokenizer; returns its number of pieces, at most 1,500.

    LLaVA's system prompt is one of them, or it would be half of every sample.
    """
    import sentencepiece
    from llava.conversation import conv_templates

    prompt = conv_templates["v1"].system
    lines = [f"{prompt} USER: ASSISTANT:"] * 50
    for name in ("text", "captions", "finetune"):
        for row in json.loads((output / "data" / f"{name}.json").read_text()):
            lines += [turn["value"].replace("<image>\n", "") for turn in row["conversations"]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=1500,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=[prompt.replace(" ", "▁")],
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()


def make_llm(output: Path) -> None:
    """Write the tokenizer and a Llama of 2.5 million random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with atomic_directory(output / "llm", replace=True) as temporary:
        pieces = make_tokenizer(output, temporary)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=pieces,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            max_position_embeddings=512,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(temporary)


def guesses(output: Path) -> dict[str, str]:
    """Question -> its most frequent answer in training: what a model that ignores the picture would say."""
    counts: dict[str, Counter[str]] = {}
    for row in json.loads((output / "data" / "finetune.json").read_text()):
        question, answer = (turn["value"].replace("<image>\n", "") for turn in row["conversations"])
        counts.setdefault(question, Counter())[answer] += 1
    return {question: answers.most_common(1)[0][0] for question, answers in counts.items()}


def score(output: Path, name: str) -> None:
    """Write the accuracy of exact answers by kind of question, a file each, to ``DIR/scores/NAME``.

    ``side-seedN`` goes to ``DIR/scores/side/seedN``: ``llm2clip compare`` takes the files below ``side`` for its runs.
    """
    questions = output / "data" / "questions.jsonl"
    held_out = [json.loads(line) for line in questions.read_text().splitlines()]
    answers = [json.loads(line) for line in (output / f"{name}.answers.jsonl").read_text().splitlines()]
    answer_to = {answer["question_id"]: answer["text"].strip() for answer in answers}
    guessed = guesses(output)
    side, _, seed = name.partition("-")
    for kind in ("emoji group", "easy-vqa"):
        rows = [row for row in held_out if row["kind"] == kind]
        items = [
            {
                "id": row["question_id"],
                "cluster": row["cluster"],
                "score": float(answer_to[row["question_id"]].lower() == row["truth"].lower()),
                "category": row["category"],
                "question": row["text"],
                "answer": answer_to[row["question_id"]],
                "truth": row["truth"],
                "image": row["image"],
            }
            for row in rows
        ]
        accuracy = 100 * sum(item["score"] for item in items) / len(items)
        blind = 100 * sum(guessed.get(row["text"]) == row["truth"] for row in rows) / len(rows)
        record = ScoreFile(
            benchmark=f"miniature: {kind}",
            metrics={"accuracy": accuracy, "without_looking": blind},
            items=items,
            counts={"questions": len(items), "clusters": len({item["cluster"] for item in items})},
            model=side,
            provenance={"data": str(output / "data" / "images"), "data_sha256": sha256_file(questions)},
            notes=[MINIATURE, f"without the picture, by the most frequent answer to the same question: {blind:.1f} %"],
        )
        record.write(output / "scores" / side / seed / f"{kind.replace(' ', '-')}.scores.json")
        print(f"{name:>8}  {kind:12} {accuracy:5.1f} % of {len(items)} questions (without the picture: {blind:.1f} %)")


def main() -> None:
    """Run one of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prepare", "score"))
    parser.add_argument("names", nargs="*", help="names of the answer files, for score")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--concepts", type=int, default=0, help="training emoji; 0: all 1,068")
    options = parser.parse_args()
    if options.part == "prepare":
        make_data(options.output / "data", options.concepts)
        make_llm(options.output)
    for name in options.names:
        score(options.output, name)


if __name__ == "__main__":
    main()
