"""VQAv2, VizWiz and TextVQA: short answers, compared with those of ten people.

Two processors of answers exist in the field. The *VQA API* one (``processPunctuation`` and
``processDigitArticle`` of the VQA evaluation, https://visualqa.org/evaluation.html) and the *M4C*
one, which first splits words; LLaVA uses the latter for TextVQA and for the files it sends to the
VQAv2 and VizWiz servers. Comments mark their quirks.
"""

import re
from collections.abc import Hashable, Sequence
from functools import lru_cache
from pathlib import Path

from llava_integration.evaluator.benchmarks import benchmark as base
from llava_integration.evaluator.benchmarks.answers import (
    Answer,
    Answers,
    Row,
    read_jsonl,
)
from llm2clip_plugin.json_files import read_json_value

NUMBERS = {"none": "0", **{word: str(value) for value, word in enumerate(
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
)}}  # fmt: skip
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The authors meant a look-behind and wrote a look-ahead for the characters '<=' and a digit, which
# always holds before a full stop: so a full stop goes unless a digit follows ('3.' -> '3', '.5'
# stays).
FULL_STOP = re.compile(r"\.(?!\d)")
FULL_STOPS_AT_MOST = 32  # re.UNICODE, passed where the count belongs
DIGIT_COMMA = re.compile(r"\d,\d")

CACHED = 1 << 16  # texts: human answers are few words, ten times over
# The contraction table maps each word below without one of its apostrophes to the word.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't
mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
""".split()


def _contractions() -> dict[str, str]:
    """A contraction without one of its apostrophes -> the contraction."""
    table = {}
    for word in _CONTRACTED:
        for index, letter in enumerate(word):
            if letter == "'":
                table[word[:index] + word[index + 1 :]] = word
    table["somebody'd"] = "somebodyd"  # the wrong way round in the original
    return table


CONTRACTIONS = _contractions()


def strip_punctuation(text: str) -> str:
    """Delete a punctuation mark that touches a space anywhere, else make it a space; then full
    stops. A comma between digits anywhere makes every mark go without a space."""
    out = text
    delete_all = DIGIT_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        delete = delete_all or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if delete else " ")
    return FULL_STOP.sub("", out, count=FULL_STOPS_AT_MOST)


def digits_and_articles(text: str) -> str:
    """Lower case, number words as digits, articles dropped, apostrophes of contractions put
    back."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(
        CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES
    )


def one_line(text: str) -> str:
    """Newlines and tabs as spaces, ends stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=CACHED)
def vqa_api(text: str) -> str:
    """The VQA API's normal form, of a text that went through ``one_line``."""
    return digits_and_articles(strip_punctuation(text))


@lru_cache(maxsize=CACHED)
def m4c(text: str) -> str:
    """The M4C normal form: commas and question marks go first, and ``'s`` becomes a word."""
    split = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return digits_and_articles(strip_punctuation(one_line(split)))


def leave_one_out(prediction: str, humans: Sequence[str]) -> float:
    """Mean over the humans of min(1, matches among the others / 3): 0, .3, .6, .9 or 1 with ten
    humans."""
    if not humans:
        return 0.0
    matches = sum(answer == prediction for answer in humans)
    scores: list[float] = []
    for answer in humans:
        others = matches - 1 if answer == prediction else matches
        scores.append(min(1, others / 3))
    # sum() as the evaluators call it: from Python 3.12 on, it rounds other than repeated +=
    return float(sum(scores)) / len(humans)


def vqa_api_accuracy(prediction: str, humans: Sequence[str]) -> float:
    """Accuracy of the VQA API: texts are normalized only where the humans disagree, so 'Yes'
    against 'yes' may be 0."""
    prediction = one_line(prediction)
    humans = [one_line(answer) for answer in humans]
    if len(set(humans)) > 1:
        prediction = vqa_api(prediction)
        humans = [vqa_api(answer) for answer in humans]
    return leave_one_out(prediction, humans)


def vqa_api_numbers(items: Sequence[base.Item], *parts: str) -> dict:
    """The VQA API's numbers, also by each field of ``parts``: percent, rounded as it does, and once
    unrounded."""
    return {
        "overall": round(100 * base.mean_of(items), 2),
        "overall_unrounded": 100 * base.mean_of(items),
        **{f"per_{part}": base.percents(items, part) for part in parts},
    }


VAL_QUESTIONS = ("*OpenEnded*val2014_questions*.json", "*OpenEnded*questions*.json")


class VQAv2(base.Benchmark):
    """Ten human answers per question; those of test-dev are known to the server only.

    Rule: the VQA API's, on LLaVA's ``convert_vqav2_for_submission.py`` of the answers
    (``converted_submission``), through which LLaVA's published numbers went. The converter splits
    ``'s`` off as a word, which no human answer has, so possessives score 0 through it; unanimous
    answers are compared without normalization.
    """

    def load(self, folder: Path) -> list[base.Question]:
        where = (
            "val2014's are at https://visualqa.org/download.html; "
            "the server scores test-dev: --submission FILE"
        )
        annotations = self.require(
            folder, "*val2014_annotations*.json", "*annotations*.json", where=where
        )
        path = self.require(folder, *VAL_QUESTIONS, where=where)
        truths = {
            entry["question_id"]: entry
            for entry in read_json_value(annotations)["annotations"]
        }
        llavas = base.first_file(folder, *self.question_files)  # it names the pictures
        rows = read_jsonl(llavas) if llavas else []
        images = {str(row["question_id"]): str(row.get("image", "")) for row in rows}
        questions = []
        for entry in read_json_value(path)["questions"]:
            truth = truths[entry["question_id"]]
            questions.append(
                base.Question(
                    id=entry["question_id"],
                    text=entry["question"],
                    cluster=str(entry["image_id"]),
                    truth=[answer["answer"] for answer in truth["answers"]],
                    image=images.get(str(entry["question_id"]), _val_image(entry)),
                    category=truth["answer_type"],
                    extra={
                        "answer_type": truth["answer_type"],
                        "question_type": truth["question_type"],
                    },
                )
            )
        return questions

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        """A missing answer is submitted as '' by the converter."""
        text = base.text_of(answer)
        submission = text if answer and answer.layout == "submission" else m4c(text)
        score = vqa_api_accuracy(submission, question.truth)
        return base.item_of(question, answer, score=score, submission=submission)

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        return base.flatten(
            {
                "converted_submission": vqa_api_numbers(
                    items, "answer_type", "question_type"
                )
            }
        )

    def question_rows(self, folder: Path) -> list[Row]:
        path = base.first_file(folder, *VAL_QUESTIONS)
        if path is None:
            return []
        return [
            base.question_row(
                entry["question_id"],
                _val_image(entry),
                f"{entry['question']}\n{base.SHORT_ANSWER}",
            )
            for entry in read_json_value(path)["questions"]
        ]

    def submission_rows(self, folder: Path, answers: Answers) -> list[Row]:
        """One normalized answer for every question of LLaVA's question file, '' where missing."""
        path = self.require(
            folder, *self.question_files, where="it is in LLaVA's eval.zip"
        )
        texts = {str(answer.id): answer.text for answer in answers.rows}
        rows = []
        for row in read_jsonl(path):
            identifier = row["question_id"]
            answer = texts.get(str(identifier)) or ""
            rows.append({"question_id": identifier, "answer": m4c(answer)})
        return rows


def _val_image(entry: Row) -> str:
    return f"COCO_val2014_{entry['image_id']:012d}.jpg"


VQAV2 = VQAv2(
    name="vqav2",
    title="VQAv2",
    order=1,
    headline="converted_submission.overall_unrounded",
    folders=("vqav2",),
    annotations=("*annotations*.json", "*OpenEnded*questions*.json"),
    question_files=("llava_vqav2*.jsonl",),
    scored_question_files=("llava_vqav2*val*.jsonl",),
    image_folders=("val2014", "test2015", "images", ""),
    submission_format="json",
    published=base.published_scores(
        llava_7b=78.5, llava_13b=80.0, reproduced_7b=79.04, llm2clip_7b=79.80
    ),
)


UNANSWERABLE = (
    "When the provided information is insufficient, respond with 'Unanswerable'."
)


class VizWiz(base.Benchmark):
    """Ten crowd answers per picture, often 'unanswerable'; val is scored here, test by the server.

    Rule: the VQA API's, of which the challenge's code is a fork, on LLaVA's
    ``convert_vizwiz_for_submission.py``.
    """

    def load(self, folder: Path) -> list[base.Question]:
        """Questions of val.json, with the ids of LLaVA's question file of val, or else their
        positions in val.json."""
        where = (
            "in Annotations.zip at https://vizwiz.org/tasks-and-datasets/vqa; "
            "the server scores test: --submission"
        )
        annotations = self.require(folder, "val.json", "*val*.json", where=where)
        entries = read_json_value(annotations)
        path = base.first_file(folder, *self.scored_question_files)
        ids = {}
        if path:
            ids = {row["image"]: row["question_id"] for row in read_jsonl(path)}
        unknown = [entry["image"] for entry in entries if entry["image"] not in ids]
        if path and unknown:
            raise ValueError(
                f"{len(unknown)} images of {annotations}, first {unknown[0]}, are not in {path}"
            )
        questions = []
        for position, entry in enumerate(entries):
            kind = entry.get("answer_type", "")
            questions.append(
                base.Question(
                    id=ids.get(entry["image"], position),
                    text=entry["question"],
                    truth=[answer["answer"] for answer in entry["answers"]],
                    image=entry["image"],
                    category=kind,
                    extra={"answer_type": kind},
                )
            )
        return questions

    def question_keys(self, question: base.Question) -> tuple[Hashable, ...]:
        """LLaVA's id, and the image's name, which submissions have."""
        return ("id", str(question.id)), ("image", Path(question.image).stem)

    def answer_key(self, answer: Answer) -> Hashable:
        if answer.layout == "llava":
            return "id", str(answer.id)
        return "image", Path(str(answer.id)).stem

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        """A missing answer scores 0."""
        submission = m4c(base.text_of(answer))
        score = vqa_api_accuracy(submission, question.truth) if answer else 0.0
        return base.item_of(question, answer, score=score, submission=submission)

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        return base.flatten({"vqa_api": vqa_api_numbers(items, "answer_type")})

    def question_rows(self, folder: Path) -> list[Row]:
        return [
            base.question_row(
                position,
                entry["image"],
                f"{entry['question']}\n{UNANSWERABLE}\n{base.SHORT_ANSWER}",
            )
            for position, entry in enumerate(read_json_value(folder / "val.json"))
        ]

    def submission_rows(self, folder: Path, answers: Answers) -> list[Row]:
        """The server's file: an answer to every question."""
        where = "LLaVA's questions, in its eval.zip: question_id, image, text"
        rows = read_jsonl(self.require(folder, *self.question_files, where=where))
        texts = base.texts_by_id(answers, [row["question_id"] for row in rows])
        return [
            {"image": row["image"], "answer": m4c(texts[str(row["question_id"])])}
            for row in rows
        ]


VIZWIZ = VizWiz(
    name="vizwiz",
    title="VizWiz",
    order=3,
    headline="vqa_api.overall_unrounded",
    folders=("vizwiz",),
    annotations=("val.json",),
    question_files=("llava_val*.jsonl", "llava_test*.jsonl"),
    scored_question_files=("llava_val*.jsonl",),
    image_folders=("val", "test", "images", ""),
    submission_format="json",
    published=base.published_scores(
        llava_7b=50.0, llava_13b=53.6, reproduced_7b=50.57, llm2clip_7b=52.37
    ),
)


TOKENS_FIRST = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


class TextVQA(base.Benchmark):
    """Val 0.5.1: ten human answers, compared with the M4C evaluator as in LLaVA's
    ``eval_textvqa.py``.

    LLaVA's answers have the image's id, so they are joined by it and by the question in their
    *prompt*. Annotations with the same image and question are one for the official script, the
    last; unanswered questions cost nothing, since it divides by the number of answers.
    """

    def load(self, folder: Path) -> list[base.Question]:
        where = "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json"
        path = self.require(
            folder, "TextVQA_0.5.1_val.json", "TextVQA*val*.json", where=where
        )
        entries = read_json_value(path)["data"]
        last = {
            (entry["image_id"], entry["question"].lower()): entry for entry in entries
        }
        return [
            base.Question(
                id=entry["question_id"],
                text=entry["question"],
                cluster=entry["image_id"],
                truth=entry["answers"],
                image=f"{entry['image_id']}.jpg",
                category=(entry.get("image_classes") or [""])[0],
                rule=last[entry["image_id"], entry["question"].lower()],
            )
            for entry in entries
        ]

    def question_keys(self, question: base.Question) -> tuple[Hashable, ...]:
        return str(question.id), (question.cluster, question.text.lower())

    def answer_key(self, answer: Answer) -> Hashable | None:
        """Image and question; the annotation's id for a submission."""
        if not answer.prompt:
            return str(answer.id)
        text = question_in(answer.prompt)
        return None if text is None else (str(answer.id), text)

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        """``line``: the answer's line in the file, from 0; -1 for none. The M4C normal form on both
        sides, always."""
        normalized = m4c(base.text_of(answer))
        official = question.rule
        score = 0.0
        if answer:
            score = leave_one_out(
                normalized, [m4c(human) for human in official["answers"]]
            )
        return base.item_of(
            question,
            answer,
            score=score,
            line=answer.line - 1 if answer else -1,
            question_id=question.cluster,  # LLaVA's question_id is the image's
            annotation_question_id=official["question_id"],
            normalized=normalized,
            truth=official["answers"],
        )

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        answered = [item for item in items if not item["missing"]]
        accuracy = 100 * base.mean_of(answered)
        return {
            "samples": float(len(answered)),
            "accuracy_percent": accuracy,
            "accuracy_printed": round(accuracy, 2),
        }


def question_in(prompt: str) -> str | None:
    """The question in one of LLaVA's four prompt forms, lower case; None in any other."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        question = TOKENS_FIRST.search(prompt)
        return question[1].lower() if question else None
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


TEXTVQA = TextVQA(
    name="textvqa",
    title="TextVQA",
    order=5,
    folders=("textvqa",),
    annotations=("TextVQA*val*.json",),
    question_files=("llava_textvqa*.jsonl",),
    image_folders=("train_images", "train_val_images/train_images", "images", ""),
    answered_only=True,
    published=base.published_scores(
        llava_7b=58.2, llava_13b=61.3, reproduced_7b=57.48, llm2clip_7b=58.35
    ),
)
BENCHMARK = [VQAV2, VIZWIZ, TEXTVQA]
