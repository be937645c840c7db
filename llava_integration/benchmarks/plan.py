"""How LLaVA's scripts ask each benchmark (``scripts/v1_5/eval/*.sh``), and which benchmarks have their files here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llava_integration.benchmarks.answers import read_json
from llava_integration.benchmarks.base import MODULES, Benchmark, benchmark, optional_file
from llm2clip_plugin.contracts import whole_file

SHORT = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."

# What evaluate is told beside model, questions, images and answers. The scripts leave the number of new tokens to their
# programs: 128 of model_vqa_loader, 1024 of model_vqa, model_vqa_science and model_vqa_mmbench.
EVALUATE: dict[str, tuple[str, ...]] = {
    "vqav2": (),
    "gqa": (),
    "vizwiz": (),
    "scienceqa": ("--single-pred-prompt", "--max-new-tokens", "1024"),
    "textvqa": (),
    "pope": (),
    "mme": (),
    "mmbench": ("--single-pred-prompt", "--max-new-tokens", "1024"),
    "mmbench_cn": ("--single-pred-prompt", "--lang", "cn", "--max-new-tokens", "1024"),
    "seedbench": (),
    "llava_bench": ("--max-new-tokens", "1024"),
    "mmvet": ("--max-new-tokens", "1024"),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark whose files are here."""

    chosen: Benchmark
    folder: Path
    question_file: Path
    image_folder: Path | None  # None: the pictures are in the question file
    scored: bool  # False: answers can be made, but their truth is with a server
    why_not: str = ""  # what scoring lacks


@dataclass(frozen=True, kw_only=True)
class Lacking:
    """A benchmark whose files are not here, and which."""

    chosen: Benchmark
    reason: str


def plan(name: str, root: Path, scratch: Path) -> Task | Lacking:
    """Look for a benchmark's files below LLaVA's evaluation folder.

    ``scratch`` takes question files that LLaVA doesn't ship (VQAv2 val, VizWiz val), made from the annotations.
    """
    chosen = benchmark(name)
    folders = [root / folder for folder in chosen.folders if (root / folder).is_dir()]
    if not folders:
        return Lacking(chosen=chosen, reason=f"no folder {' or '.join(chosen.folders)} in {root}")
    reasons = []
    for folder in folders:
        try:
            chosen.load(folder)
            scored, why = True, ""
        except (FileNotFoundError, ValueError) as error:
            scored, why = False, str(error)
        questions = question_file(chosen, folder, scratch, scored)
        if questions is None:
            reasons.append(why or f"{folder} has no question file {' or '.join(chosen.questions)}")
            continue
        if not scored and chosen.submission is None:
            reasons.append(why)
            continue
        images = None if questions.suffix == ".tsv" else image_folder(chosen, folder, questions)
        if images is None and questions.suffix != ".tsv":
            places = " or ".join(str(folder / below) for below in chosen.image_folders)
            reasons.append(f"the pictures of {questions.name} are in none of {places}")
            continue
        return Task(
            chosen=chosen, folder=folder, question_file=questions, image_folder=images, scored=scored, why_not=why
        )
    return Lacking(chosen=chosen, reason="; ".join(reasons))


def question_file(chosen: Benchmark, folder: Path, scratch: Path, scored: bool) -> Path | None:
    """LLaVA's question file; of a val split it is made from the annotations where LLaVA ships none."""
    if scored and chosen.name == "vqav2":
        return optional_file(folder, "llava_vqav2*val*.jsonl") or _write(
            vqav2_rows(folder), scratch / "vqav2_val.jsonl"
        )
    if scored and chosen.name == "vizwiz":
        return optional_file(folder, "llava_val*.jsonl") or _write(vizwiz_rows(folder), scratch / "vizwiz_val.jsonl")
    return optional_file(folder, *chosen.questions)


def vqav2_rows(folder: Path) -> list[dict]:
    """VQAv2 val as LLaVA asks it."""
    path = optional_file(folder, "*OpenEnded*val2014_questions*.json", "*OpenEnded*questions*.json")
    entries = read_json(path)["questions"] if path else []
    return [
        {
            "question_id": entry["question_id"],
            "image": f"COCO_val2014_{entry['image_id']:012d}.jpg",
            "text": f"{entry['question']}\n{SHORT}",
            "category": "default",
        }
        for entry in entries
    ]


def vizwiz_rows(folder: Path) -> list[dict]:
    """VizWiz val as LLaVA asks its test split."""
    return [
        {
            "question_id": place,
            "image": entry["image"],
            "text": f"{entry['question']}\n{UNANSWERABLE}\n{SHORT}",
            "category": "default",
        }
        for place, entry in enumerate(read_json(folder / "val.json"))
    ]


def _write(rows: list[dict], path: Path) -> Path | None:
    if not rows:
        return None
    with whole_file(path) as aside:
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def image_folder(chosen: Benchmark, folder: Path, questions: Path) -> Path | None:
    """The first of a benchmark's image folders that holds the first pictures asked about."""
    names = first_images(questions)
    for below in chosen.image_folders:
        if names and all((folder / below / name).is_file() for name in names):
            return folder / below
    return None


def first_images(questions: Path, most: int = 3) -> list[str]:
    """Image names of the first questions that have one."""
    if questions.suffix == ".json":
        return [row["image"] for row in read_json(questions) if row.get("image")][:most]
    names: list[str] = []
    with questions.open(encoding="utf-8") as file:
        for line in file:
            name = json.loads(line).get("image") if line.strip() else None
            if name:
                names.append(name)
            if len(names) == most:
                break
    return names


def plans(names: list[str], root: Path, scratch: Path) -> list[Task | Lacking]:
    """The plan of every benchmark named, in the usual order; all if none is."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; --data is LLaVA's playground/data/eval, from its eval.zip")
    for name in names:
        benchmark(name)  # an unknown one is an error at once
    return [plan(name, root, scratch) for name in MODULES if not names or name in names]
