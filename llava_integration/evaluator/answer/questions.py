"""Question files of LLaVA's evaluation scripts, in their three formats, and the answers file.

| suffix    | benchmark scripts                           | LLaVA's own program     |
|-----------|---------------------------------------------|-------------------------|
| ``.jsonl``| VQAv2, GQA, VizWiz, TextVQA, POPE, MME, ... | ``model_vqa_loader``    |
| ``.json`` | ScienceQA (conversations, some without image)| ``model_vqa_science``  |
| ``.tsv``  | MMBench (base64 images, rotated options)    | ``model_vqa_mmbench``   |
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import shutil
import struct
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from llava_integration.evaluator.benchmarks.answers import json_lines
from llava_integration.evaluator.benchmarks.rules.mmbench import PANDAS_MISSING
from llm2clip_plugin.atomic import naming_full_disk, write_text
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.hashes import canonical_json, sha256_file, sha256_text
from llm2clip_plugin.json_files import read_json_value
from llm2clip_plugin.options import Command, command, setting
from llm2clip_plugin.outside import check_image_size

# Pillow's
BAD_IMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)
# LLaVA's place of the image, put before the question; a second one would need another image
IMAGE = "<image>"
GRAY = (128, 128, 128)  # of the picture that a blind answer is given to
LETTERS = ("A", "B", "C", "D")
DIRECTLY = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question, identified by its index in the file (MME and MMBench repeat their ids)."""

    id: Any  # question_id of the answer
    text: str  # question for the model, without the image token
    prompt: str  # "prompt" of the answer, as LLaVA writes it
    # file in the image folder, or base64 where ``embedded``; "" without image
    image: str = ""
    embedded: bool = False
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of the answer

    def open_image(self, folder: str, *, blind: bool = False) -> Image.Image:
        """The image in RGB, or a gray one of its size; raises ValueError with the question's id if
        it cannot be read, or is outside the folder."""
        path = Path(folder) / self.image
        inside = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
        if not self.embedded and not inside:
            raise ValueError(
                f"question {self.id!r}: image {self.image!r} is outside "
                f"--image-folder {folder or '.'}"
            )
        try:
            source = io.BytesIO(base64.b64decode(self.image)) if self.embedded else path
            image = Image.open(source)
            check_image_size(*image.size)
            if blind:
                return Image.new("RGB", image.size, GRAY)
            return image.convert("RGB")
        except BAD_IMAGE as error:
            where = "the embedded image" if self.embedded else str(path)
            raise ValueError(
                f"question {self.id!r}: cannot read {where}: {error}"
            ) from error


def read_questions(
    path: Path, *, directly: bool = False, all_rounds: bool = False, lang: str = "en"
) -> list[Question]:
    """The questions of a file, whose suffix selects the format. Raises FileNotFoundError, or
    ValueError with the line.

    ``directly`` requests the option's letter only (LLaVA's --single-pred-prompt), ``all_rounds``
    repeats MMBench's questions for every rotation of the options, ``lang`` is MMBench's."""
    if not path.is_file():
        raise FileNotFoundError(f"no question file at {path}")
    questions = []
    with errors_about(path, fix="download it again"):
        if path.suffix == ".jsonl":
            for where, row in json_lines(path):
                fix = "expected an object with question_id, text and image"
                if "question" in row and "text" not in row:
                    fix += f" (own questions: `{command('bench-mllm', path)} ...`)"
                with errors_about(where, fix=fix):
                    # TypeError for numbers
                    text = row["text"] + ""
                    image = row.get("image", "") + ""
                    asked = without_image_token(text) if IMAGE in text else text
                    questions.append(
                        Question(
                            id=row["question_id"], text=asked, prompt=text, image=image
                        )
                    )
        elif path.suffix == ".json":
            # LLaVA's conversations, of which the first turn is the question
            for number, row in enumerate(read_json_value(path)):
                with errors_about(
                    f"{path}, entry {number}",
                    fix="expected an object with id and conversations",
                ):
                    image = row.get("image", "") + ""
                    text = without_image_token(row["conversations"][0]["value"])
                    if directly:
                        text += f"\n{DIRECTLY['en']}"
                    prompt = f"{IMAGE}\n{text}" if image else text
                    questions.append(
                        Question(id=row["id"], text=text, prompt=prompt, image=image)
                    )
        elif path.suffix == ".tsv":
            questions = read_table(path, directly, all_rounds, lang)
        else:
            raise ContractError(
                f"{path}: expected a file .jsonl, .json (ScienceQA) or .tsv (MMBench)"
            )
    if not questions:
        raise ContractError(f"{path} has no questions; download it again")
    return questions


def without_image_token(text: str) -> str:
    """A question without LLaVA's place of the image."""
    return text.replace(IMAGE, "").strip()


def read_table(
    path: Path, directly: bool, all_rounds: bool, lang: str
) -> list[Question]:
    """MMBench: a question per row, repeated for every rotation of its options if ``all_rounds``."""
    csv.field_size_limit(sys.maxsize)  # cells contain images
    suffix = f"\n{DIRECTLY[lang]}" if directly else ""
    questions = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            options: list[str] = []
            for letter in LETTERS:
                if is_none(row.get(letter)):
                    break
                options.append(row[letter])
            # of the options as they are in the row
            letters = list(LETTERS[: len(options)])
            hint = [] if is_none(row.get("hint")) else [row["hint"]]
            for number in range(len(options) if all_rounds else 1):
                listed = [
                    f"{letter}. {option}"
                    for letter, option in zip(LETTERS, options, strict=False)
                ]
                prompt = "\n".join([*hint, row["question"], *listed])
                index = int(row["index"]) if row["index"].isdigit() else row["index"]
                questions.append(
                    Question(
                        id=index,
                        text=prompt + suffix,
                        prompt=prompt,
                        image=row["image"],
                        embedded=True,
                        extra={
                            "round_id": number,
                            "options": options,
                            "option_char": letters,
                        },
                    )
                )
                options = options[1:] + options[:1]
                letters = letters[1:] + letters[:1]
    return questions


def is_none(cell: str | None) -> bool:
    """Whether a cell of MMBench's table is empty, for pandas or for LLaVA's program."""
    return cell is None or cell in PANDAS_MISSING or cell.lower() in ("nan", "none")


# The answers file. Several ranks write it and a killed run resumes it: until all answers exist,
# ANSWERS.partial/ has a file per process; the rank that finds them complete merges them. No rank
# waits for another.

# among the settings: of the stamps of the questions' pictures
PICTURES = "pictures_sha256"
PICTURES_READ = 64  # pictures whose contents decide whether they are those of before
OTHER_FILE = "choose another --answers-file or pass --overwrite"
# among the settings: of the model's weights; absent where a server's are not on this machine
WEIGHTS = "model_sample_sha256"
# a server that is started again has another port; each answer names its own
IGNORED_ON_RESUME = ("endpoint",)
# what answers were made with that do not say so
UNRECORDED = {"blind": False}


def entry(
    question: Question, text: str, model: str, metadata: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A line of LLaVA's answers file."""
    return {
        "question_id": question.id,
        "prompt": question.prompt,
        "text": text,
        **question.extra,
        "answer_id": uuid.uuid4().hex[:22],
        "model_id": model,
        "metadata": metadata or {},
    }


def picture_stamps(questions: Sequence[Question], folder: str) -> list[str]:
    """Of each question's image file its size, and of PICTURES_READ of the files a hash of what they
    contain; where they are, and when they were copied there, does not matter. "" without one."""
    names = sorted({question.image for question in questions if not question.embedded})
    every = max(1, len(names) // PICTURES_READ)
    stamp_of: dict[str, str] = {}
    for number, name in enumerate(names):
        path = Path(folder) / name
        if name and os.path.isfile(path):
            stamp_of[name] = str(path.stat().st_size)
            if number % every == 0:
                stamp_of[name] += f" {sha256_file(path)}"
    return [stamp_of.get(question.image, "") for question in questions]


def settings_file(answers: Path) -> Path:
    """Where an answers file's settings are: the model and what its answers depend on."""
    return answers.with_name(answers.name + ".settings.json")


class AnswersFile:
    """The answers of one run, by index in the question file."""

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        pictures: Sequence[str],
        *,
        overwrite: bool = False,
    ):
        """``settings``: every setting that an answer depends on, saved as
        ``ANSWERS.settings.json``. ``pictures``: the stamp of each question's picture. Raises
        ContractError if answers with other settings, or all answers about other pictures exist,
        unless ``overwrite``; ValueError for a folder."""
        self.path = path
        self.pictures = list(pictures)
        self.total = len(self.pictures)
        digest = sha256_text(canonical_json(self.pictures))
        self.settings = {**settings, PICTURES: digest}
        self.partial = path.with_name(path.name + ".partial")
        self.partial_file = self.partial / f"{uuid.uuid4().hex[:12]}.jsonl"
        saved = settings_file(path)
        if path.is_dir():
            raise ValueError(
                f"--answers-file {path} is a folder; choose a file to write"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            path.unlink(missing_ok=True)
            saved.unlink(missing_ok=True)
            shutil.rmtree(self.partial, ignore_errors=True)
        if saved.is_file():
            # an earlier release may have recorded less
            before = {**UNRECORDED, **read_json_value(saved)}
            changes = self.changes_since(before)
            if changes:
                raise ContractError(
                    f"{path} was started with other settings ({', '.join(changes)}); {OTHER_FILE}"
                )
        elif path.exists() or self.partial.exists():
            raise ContractError(f"{path} was written by another program; {OTHER_FILE}")
        else:
            self.write_settings()

    def changes_since(self, before: dict[str, Any]) -> list[str]:
        """How the settings differ from earlier ones, where that changes answers."""
        changes = []
        for name, old in before.items():
            new = self.settings.get(name, UNRECORDED.get(name))
            if name in IGNORED_ON_RESUME or old == new:
                continue
            if name == PICTURES:
                # before that, questions whose picture changed are asked again
                if self.path.is_file():
                    changes.append("the questions' pictures changed since")
            elif name != WEIGHTS or new or "served_model" not in self.settings:
                changes.append(f"{name} {old!r} -> {new!r}")
        return changes

    def write_settings(self) -> None:
        """Write the settings file."""
        text = json.dumps(self.settings, indent=2)
        write_text(settings_file(self.path), f"{text}\n")

    def done(self) -> dict[int, dict[str, Any]]:
        """The answers of all ranks and earlier runs; a line cut short by a kill is ignored, and so
        is one about a picture that is another one now."""
        answers: dict[int, dict[str, Any]] = {}
        for file in sorted(self.partial.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    entry = json.loads(line)
                    index = entry["index"]
                    now = self.pictures[index]
                    if entry.get("picture", now) == now:
                        answers[index] = entry["answer"]
                except (ValueError, LookupError, TypeError):
                    continue
        return answers

    def write(self, answers: dict[int, dict[str, Any]]) -> None:
        """Append answers to this process's file; raises DiskFullError, and what was written before
        is resumed."""
        self.partial.mkdir(exist_ok=True)
        with (
            naming_full_disk(self.path),
            self.partial_file.open("a", encoding="utf-8") as file,
        ):
            for index, answer in answers.items():
                record = {
                    "index": index,
                    "picture": self.pictures[index],
                    "answer": answer,
                }
                file.write(f"{json.dumps(record, ensure_ascii=False)}\n")

    def finish(self) -> int:
        """Write the answers file, in the order of the questions, if none is missing; returns how
        many are."""
        answers = {}
        with suppress(FileNotFoundError):  # another rank has merged and deleted them
            answers = self.done()
        if self.path.is_file():
            return 0
        if len(answers) < self.total:
            return self.total - len(answers)
        self.write_settings()  # with the pictures as they are now
        write_text(
            self.path, "".join(json.dumps(answers[i]) + "\n" for i in range(self.total))
        )
        shutil.rmtree(self.partial, ignore_errors=True)
        return 0


# The options of ``llm2clip llava evaluate``, which are LLaVA's own and ours.

KEY = "OPENAI_API_KEY"  # environment variable, as OpenAI's client reads it


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that answers: a LLaVA checkpoint, or one behind a server."""

    model_path: str = setting("", help="LLaVA checkpoint: full, LoRA or projector")
    model_base: str | None = setting(
        None,
        help="base model of a LoRA or projector checkpoint",
        needs="not endpoint",
    )
    endpoint: str = setting(
        "",
        help="URL of an OpenAI-compatible server to ask instead, e.g. http://localhost:8000/v1",
    )
    served_model_name: str = setting(
        "",
        help='with --endpoint: the model; "": the only one',
        also=("model",),
        needs="endpoint",
    )
    conv_mode: str = setting("vicuna_v1", help="conversation template")
    batch_size: int = setting(1, help="questions per batch")
    device: Literal["auto", "cuda", "cpu"] = setting("auto", help="device of the model")
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = setting(
        "auto",
        help="type of the weights; auto: float16 on GPUs, as in LLaVA, and on CPUs the faster one "
        "of bfloat16 and float32",
    )
    blind: bool = setting(
        False,
        help="replace each picture by a gray one of its size; `compare --blind` reads the scores",
    )
    overwrite: bool = setting(False, help="discard existing answers")

    def __post_init__(self) -> None:
        if bool(self.model_path) == bool(self.endpoint):
            raise ValueError(
                "--model-path and --endpoint: give one, "
                "a LLaVA checkpoint or the URL of a served model"
            )


@dataclass(frozen=True, kw_only=True)
class AnswerConfig(ModelConfig):
    """A question file, and the model that answers it."""

    question_file: Path = setting(
        help=".jsonl, .json (ScienceQA) or .tsv (MMBench)",
        also=("data",),
    )
    answers_file: Path = setting(
        help="JSONL to write; an incomplete run is resumed",
        also=("output",),
    )
    image_folder: str = setting("", help="folder of the questions' images")
    num_chunks: int = setting(
        1, help="split the questions into chunks, as LLaVA's scripts do"
    )
    chunk_idx: int = setting(0, help="chunk to answer")
    temperature: float = setting(0.0, help="sampling temperature; 0: greedy decoding")
    top_p: float | None = setting(None, help="nucleus sampling: probability mass")
    num_beams: int = setting(1, help="beam search; 1: none")
    max_new_tokens: int = setting(128, help="longest answer, in tokens", unit="tokens")
    single_pred_prompt: bool = setting(
        False,
        help="ask for the option's letter only (ScienceQA, MMBench)",
    )
    all_rounds: bool = setting(
        False, help="ask every rotation of the options (MMBench)"
    )
    lang: Literal["en", "cn"] = setting("en", help="language of MMBench")
    load_8bit: bool = setting(
        False,
        help="quantize the language model to 8 bits",
        needs="not endpoint",
    )
    load_4bit: bool = setting(
        False,
        help="quantize the language model to 4 bits",
        needs="not endpoint",
    )
    workers: int = setting(4, help="data loader processes")
    concurrency: int = setting(
        16, help="with --endpoint: requests at a time", needs="endpoint"
    )
    timeout: float = setting(
        300.0,
        help="with --endpoint: seconds that an answer may take",
        unit="seconds",
        needs="endpoint",
    )
    retries: int = setting(
        8,
        help="with --endpoint: times that a failed request is sent again, after growing pauses",
        needs="endpoint",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answers_file.resolve() == self.question_file.resolve():
            raise ValueError(
                f"--answers-file {self.answers_file} is the question file; choose another"
            )
        for name in ("batch_size", "concurrency", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must be above 0"
                )


COMMAND = Command(
    name="llava evaluate",
    example="llm2clip llava evaluate --model-path checkpoints/llava-7b "
    "--question-file questions.jsonl --image-folder images --answers-file answers.jsonl",
    about="Answer a question file with a LLaVA model, on any device. The options of LLaVA's "
    "model_vqa_loader, model_vqa_science and model_vqa_mmbench are accepted, and the answers file "
    "is the same; batches, resuming and several ranks are added. With --endpoint, any model behind "
    "an OpenAI-compatible server answers it (vLLM, SGLang, llama.cpp, ...); the key is read from "
    f"{KEY}.",
    settings=AnswerConfig,
    everyday="model-path model-base endpoint question-file answers-file image-folder batch-size "
    "temperature max-new-tokens device overwrite",
)
