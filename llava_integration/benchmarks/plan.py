"""Which benchmarks have their files in LLaVA's evaluation folder, and which files those are."""

import json
from dataclasses import dataclass
from pathlib import Path

from llava_integration.benchmarks.answers import read_json
from llava_integration.benchmarks.benchmark import Benchmark, first_file
from llava_integration.benchmarks.rules import benchmark, benchmarks
from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.outside.values import errors_about


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark whose files were found."""

    benchmark: Benchmark
    folder: Path
    question_file: Path
    image_folder: Path | None  # None: the pictures are in the question file
    unscored: str = ""  # why it can't be scored here (its server has the truth); "": it can


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A benchmark whose files were not found."""

    benchmark: Benchmark
    reason: str


def plans(names: list[str], root: Path, generated: Path) -> list[Task | Missing]:
    """The plan of every named benchmark, or of all; ``generated``: folder for generated question files.

    A file ``root`` holds own questions.
    """
    if root.is_file():
        return [plan_folder(benchmark("questions"), root, generated)]
    for name in names:
        benchmark(name)  # raises for an unknown one
    return [plan(member, root, generated) for name, member in benchmarks().items() if not names or name in names]


def plan(member: Benchmark, root: Path, generated: Path) -> Task | Missing:
    """Look for a benchmark's files below LLaVA's evaluation folder."""
    folders = [root / folder for folder in member.folders if (root / folder).is_dir()]
    if not folders:
        return Missing(benchmark=member, reason=f"no folder {' or '.join(member.folders)} in {root}")
    plans_of_folders = [plan_folder(member, folder, generated) for folder in folders]
    tasks = [task for task in plans_of_folders if isinstance(task, Task)]
    reasons = [task.reason for task in plans_of_folders if isinstance(task, Missing)]
    return tasks[0] if tasks else Missing(benchmark=member, reason="; ".join(reasons))


def plan_folder(member: Benchmark, folder: Path, generated: Path) -> Task | Missing:
    """Look for a benchmark's files in one folder."""
    unscored = ""
    try:
        with errors_about(f"the {member.title} files in {folder}", fix="download them again"):
            member.load(folder)
    except (FileNotFoundError, ValueError) as error:
        unscored = str(error)
    questions = question_file(member, folder, generated, scored=not unscored)
    if questions is None:
        reason = unscored or f"{folder} has no question file {' or '.join(member.question_files)}"
        return Missing(benchmark=member, reason=reason)
    if unscored and not member.submission_format:
        return Missing(benchmark=member, reason=unscored)
    images = None
    if questions.suffix != ".tsv":  # tables hold their pictures
        images = image_folder(member, folder, questions)
        if images is None:
            places = " or ".join(str(folder / below) for below in member.image_folders)
            return Missing(benchmark=member, reason=f"the pictures of {questions.name} are not in {places}")
    return Task(benchmark=member, folder=folder, question_file=questions, image_folder=images, unscored=unscored)


def question_file(member: Benchmark, folder: Path, generated: Path, *, scored: bool) -> Path | None:
    """LLaVA's question file; for a split with annotations but without one, a file generated from the annotations."""
    if not scored or not member.scored_question_files:
        return first_file(folder, *member.question_files)
    path = first_file(folder, *member.scored_question_files)
    if path is None and (rows := member.question_rows(folder)):
        path = generated / f"{member.name}_val.jsonl"
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def image_folder(member: Benchmark, folder: Path, questions: Path) -> Path | None:
    """The first of a benchmark's image folders that has the first pictures of a question file."""
    names, folder = first_images(questions), folder.parent if folder.is_file() else folder
    for below in member.image_folders:
        if names and all((folder / below / name).is_file() for name in names):
            return folder / below
    return None


def first_images(questions: Path, most: int = 3) -> list[str]:
    """Image names of the first questions that have one."""
    if questions.suffix == ".json":
        with errors_about(questions, fix="download it again"):
            return [row["image"] for row in read_json(questions) if row.get("image")][:most]
    names: list[str] = []
    with errors_about(questions, fix="download it again"), questions.open(encoding="utf-8") as file:
        for line in file:
            name = json.loads(line).get("image") if line.strip() else None
            if name:
                names.append(name)
            if len(names) == most:
                break
    return names
