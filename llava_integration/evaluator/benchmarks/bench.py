"""``llm2clip score``: one answers file; ``llm2clip bench-mllm``: one model on every benchmark whose
files are found."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from llava_integration.evaluator.answer.questions import ModelConfig, settings_file
from llava_integration.evaluator.benchmarks.answers import (
    Answers,
    read_answers,
    read_jsonl,
)
from llava_integration.evaluator.benchmarks.benchmark import (
    ALLOWED,
    Benchmark,
    first_file,
)
from llava_integration.evaluator.benchmarks.rules import benchmark, benchmarks
from llava_integration.evaluator.benchmarks.rules.judged import reviewed
from llava_integration.evaluator.compare import report
from llava_integration.evaluator.compare.readers import read_logs
from llava_integration.evaluator.compare.sides import run_of
from llava_integration.plug.checkpoints import (
    check_checkpoint,
    config_of,
    sample_sha256,
)
from llava_integration.plug.compat.runner import installed_version
from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.hashes import sha256_file
from llm2clip_plugin.json_files import read_json_value
from llm2clip_plugin.options import Command, command, setting
from llm2clip_plugin.outside import printable_lines
from llm2clip_plugin.processes import child_environment, on_ranks, python_module

LIBRARIES = (
    "llm2clip-plugin",
    "llava-torch",
    "llava",
    "torch",
    "transformers",
    "numpy",
)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """An answers file to score."""

    benchmark: str = setting(help="one of these names")
    data: Path = setting(
        help="LLaVA's evaluation folder of the benchmark, or a .jsonl with own questions",
    )
    answers: Path = setting(
        help="answers of LLaVA's scripts, a folder of its chunks, or a submission file"
    )
    output: Path | None = setting(None, help="score file to write", also=("json",))
    submission: Path | None = setting(
        None, help="file to write for the benchmark's server"
    )
    reviews: Path | None = setting(
        None, help="the judge's file, of a benchmark that has a judge"
    )
    model: str = setting(
        "", help='the model\'s name in reports; "": from the answers file'
    )
    allow_missing: float = setting(
        ALLOWED,
        help="largest fraction of missing, duplicate, unreadable or unknown answers; without a "
        "value: 1.0",
        alone="1",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.allow_missing <= 1:
            raise ValueError(
                f"--allow-missing {self.allow_missing} must be a fraction between 0 and 1"
            )


SCORE = Command(
    name="score",
    example="llm2clip score textvqa playground/data/eval/textvqa --answers answers.jsonl "
    "--output textvqa.scores.json",
    about="Score one answers file against a benchmark's annotations, by the official rule. "
    f"BENCHMARK is one of {', '.join(benchmarks())}.",
    settings=ScoreConfig,
    arguments="benchmark data",
)


def score_answers(
    name: str,
    data: Path,
    answers: Answers,
    *,
    allow: float = ALLOWED,
    reviews: Path | None = None,
    model: str = "",
) -> ScoreFile:
    """Score answers, or a judge's ``reviews`` of them, with what they were made from. ValueError
    for another's."""
    member = benchmark(name)
    to_score = reviewed(member, answers, reviews) if member.judge else answers
    record = member.score(data, to_score, allow=allow)
    provenance: dict[str, Any] = {}
    settings = settings_file(answers.path)
    if settings.is_file():
        provenance["answer_settings"] = read_json_value(settings)
    digests = {}
    if answers.path.is_file():
        digests[str(answers.path)] = sha256_file(answers.path)
    versions = {library: installed_version(library) for library in LIBRARIES}
    provenance.update(
        data=str(data.resolve()),
        data_sha256=member.data_digest(data),
        answers=str(answers.path),
        answers_sha256=digests,
        layout=answers.layout,
        versions={library: version for library, version in versions.items() if version},
    )
    return replace(record, model=model or record.model, provenance=provenance)


def describe(member: Benchmark, record: ScoreFile) -> str:
    """Headline, counts above zero, notes, the other metrics."""
    value = record.metrics[member.headline] * member.scale
    score = f"{member.title} of {record.model}: {value:.2f} {member.unit}"
    counts = ", ".join(
        f"{name} {count}" for name, count in record.counts.items() if count
    )
    lines = [f"{score}   ({member.headline})", f"  {counts}"]
    lines += [f"  note: {note}" for note in record.notes]
    width = max((len(name) for name in record.metrics), default=0)
    lines += [
        f"  {name:<{width}}  {number:.10g}" for name, number in record.metrics.items()
    ]
    return "\n".join(lines)


def main_score(argv: list[str]) -> int:
    """Score one answers file."""
    args = SCORE.parse(argv)
    member = benchmark(args.benchmark)
    answers = read_answers(args.answers)
    if args.submission:
        if not member.submission_format:
            raise ValueError(
                f"{args.benchmark} has no server to submit to; remove --submission"
            )
        member.write_submission(args.data, answers, args.submission)
        print(
            f"wrote {args.submission} for the server of {member.title}", file=sys.stderr
        )
        if not args.output:
            return 0
    record = score_answers(
        args.benchmark,
        args.data,
        answers,
        allow=args.allow_missing,
        reviews=args.reviews,
        model=args.model,
    )
    if args.output:  # before printing, which `| head` may end
        record.write(args.output)
        print(f"wrote {args.output}", file=sys.stderr)
    print(printable_lines(describe(member, record)))
    return 0


@dataclass(frozen=True, kw_only=True)
class BenchConfig(ModelConfig):
    """A model and the benchmarks to evaluate it on."""

    data: Path | None = setting(
        None,
        help="LLaVA's playground/data/eval, or a .jsonl with own questions; for lmms-eval a folder "
        "with copies of the Hub's data sets, OWNER/NAME (without it, lmms-eval downloads them)",
    )
    output: Path = setting(help="folder for answers, scores and logs")
    benchmarks: tuple[str, ...] = setting(
        (), help="names; empty: all whose files are found"
    )
    engine: Literal["llava", "lmms-eval"] = setting(
        "llava",
        help="program that answers; lmms-eval also scores, by its own rules",
    )
    tasks: tuple[str, ...] = setting(
        (), help="lmms-eval task names; default: nine standard tasks"
    )
    gpus: int = setting(1, help="number of processes, one GPU each")
    name: str = setting(
        "",
        help='model name in score files; "": the checkpoint\'s folder, or its name on the server',
    )
    plan: bool = setting(False, help="only list the benchmarks whose files are found")
    engine_options: tuple[str, ...] = setting((), help="after --, for the engine")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "llava" and (self.tasks or self.data is None):
            problem = "bench-mllm needs DATA, LLaVA's playground/data/eval"
            if self.tasks:
                problem = "--tasks are lmms-eval's"
            raise ValueError(
                f"{problem}; or add --engine lmms-eval, "
                "which has tasks and downloads data of its own"
            )
        refused = [
            name
            for name in ("benchmarks", "endpoint", "model_base", "blind")
            if getattr(self, name)
        ]
        if self.engine == "lmms-eval" and refused:
            option = f"--{refused[0].replace('_', '-')}"
            raise ValueError(
                f"--engine lmms-eval takes no {option}; "
                "use --tasks and --model-path, or options after --"
            )
        if self.engine == "lmms-eval" and self.data and not self.data.is_dir():
            raise FileNotFoundError(
                f"no folder {self.data}; expected copies of data sets, such as Lin-Chen/MMStar"
            )


COMMAND = Command(
    name="bench-mllm",
    example="llm2clip bench-mllm playground/data/eval --model-path checkpoints/llava-7b "
    "--output runs/llava-7b",
    about="Evaluate one LLaVA checkpoint, or a served model, on every benchmark whose files are "
    f"found: {', '.join(benchmarks())}. Or on tasks of lmms-eval (--engine lmms-eval --tasks "
    "cv_bench mmvp). Answers, scores and logs are written to --output; completed ones are skipped "
    "on a rerun, and a benchmark that fails does not stop the others. Options after -- are passed "
    "to the engine (llava evaluate, or lmms_eval).",
    settings=BenchConfig,
    arguments="data",
    everyday="model-path endpoint output benchmarks engine tasks gpus batch-size blind overwrite "
    "plan",
    rest="engine_options",
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one benchmark."""

    name: str
    status: str  # scored | answered (to be scored by a server or a judge) | no files | failed
    detail: str
    value: float | None = None
    seconds: float = 0.0


def main(argv: list[str]) -> int:
    """Run the benchmarks; 1 if one of them failed, 0 otherwise."""
    args = COMMAND.parse(argv)
    if args.model_path and (args.engine == "llava" or is_llavas(args.model_path)):
        check_checkpoint(args.model_path, args.model_base)
    if args.engine == "lmms-eval":
        if find_spec("lmms_eval") is None:
            raise ValueError(
                "lmms-eval is not installed here (docs/llava.md says how); or use --engine llava"
            )
        jobs = {
            name: partial(run_lmms_eval, name, args) for name in args.tasks or TODAY
        }
        print(*(shlex.join(lmms_eval_command(name, args)) for name in jobs), sep="\n")
    else:
        assert args.data is not None  # __post_init__
        tasks = plans(list(args.benchmarks), args.data, args.output / "questions")
        print(*describe_plan(tasks), sep="\n")
        if all(task.missing for task in tasks):
            raise FileNotFoundError(
                f"no benchmark can run with the files in {args.data}; the reasons are listed above"
            )
        if not args.plan and not args.endpoint and find_spec("llava") is None:
            raise ValueError(
                "LLaVA is not installed here: pip install --no-deps llava-torch==1.2.2.post1"
            )
        jobs = {task.benchmark.name: partial(score_task, task, args) for task in tasks}
    if args.plan:
        return 0
    outcomes = [run_one(name, job, args.output) for name, job in jobs.items()]
    rows = []
    for outcome in outcomes:
        seconds = f"{outcome.seconds:.0f} s" if outcome.seconds else ""
        rows.append((outcome.name, outcome.status, seconds, outcome.detail))
    print("", *report.table(("benchmark", "status", "time", "result"), rows), sep="\n")
    record = json.dumps([vars(outcome) for outcome in outcomes], indent=2)
    write_text(args.output / "bench.json", f"{record}\n")
    scores = "scores" if args.engine == "llava" else LOGS
    sides = [f"BASE/{scores}", args.output / scores]
    if args.blind:
        sides = ["BASE/scores", "NEW/scores", "--blind", "BASE-BLIND/scores", sides[1]]
    compare = command("compare", *sides, "--output", "report")
    print(f"\ncompare two towers: {compare}", file=sys.stderr)
    return int(any(outcome.status == "failed" for outcome in outcomes))


def describe_plan(tasks: list[Task]) -> list[str]:
    """The benchmarks that will run, and why the others will not."""
    rows = []
    for task in tasks:
        name = task.benchmark.name
        files = str(task.question_file)
        if task.missing:
            rows.append((name, "no files", task.missing))
        elif task.unscored:
            rows.append((name, "will run", f"{files}; answers only: {task.unscored}"))
        elif task.benchmark.judge:
            rows.append((name, "will run", f"{files}; needs a judge"))
        else:
            rows.append((name, "will run", files))
    return report.table(("benchmark", "plan", "files"), rows)


def run_one(name: str, job: Callable[[], Outcome], output: Path) -> Outcome:
    """Evaluate and score one benchmark; an error of any kind is its outcome and does not stop the
    run."""
    started = time.monotonic()
    print(f"\n== {name}", flush=True)
    try:
        outcome = job()
    except Exception as error:
        log = write_text(output / "logs" / f"{name}.error.txt", traceback.format_exc())
        outcome = Outcome(
            name=name, status="failed", detail=f"{error} (traceback: {log})"
        )
    print(f"{outcome.status}: {outcome.detail}", flush=True)
    return replace(outcome, seconds=round(time.monotonic() - started, 1))


def score_task(task: Task, args: BenchConfig) -> Outcome:
    """Answer, score and write the score file; if only the server has the truth, write the server's
    file."""
    member = task.benchmark
    name = task.benchmark.name
    if task.missing:
        return Outcome(name=name, status="no files", detail=task.missing)
    path = args.output / "answers" / f"{name}.jsonl"
    answered_by = evaluate_command(task, args, path)
    run_logged(answered_by, args.output / "logs" / f"{name}.log", path.exists)
    answers = read_answers(path)
    if member.judge:
        score = command(
            "score", name, task.folder, "--answers", path, "--reviews", "FILE"
        )
        return Outcome(name=name, status="answered", detail=f"needs a judge: {score}")
    if task.unscored:
        upload = args.output / "submissions" / f"{name}.{member.submission_format}"
        member.write_submission(task.folder, answers, upload)
        return Outcome(
            name=name, status="answered", detail=f"to be scored by its server: {upload}"
        )
    model = args.name or (
        answers.model if args.endpoint else Path(args.model_path).name
    )
    record = score_answers(name, task.folder, answers, model=model)
    record.provenance.update(
        question_file_sha256=sha256_file(task.question_file), command=answered_by
    )
    if args.model_path:
        config = config_of(args.model_path)
        record.provenance.update(
            checkpoint=args.model_path,
            llm=config.get("_name_or_path", ""),
            tower=config.get("mm_vision_tower", ""),
            tower_sha256=(config.get("llm2clip_tower") or {}).get("weights_sha256", ""),
        )
    record.write(args.output / "scores" / f"{name}.scores.json")
    value = record.metrics[member.headline] * member.scale
    detail = f"{report.number(value, member.unit)} {member.unit}"
    if record.notes:
        detail += f" ({'; '.join(record.notes)})"
    return Outcome(name=name, status="scored", value=value, detail=detail)


# Which benchmarks have their files in LLaVA's evaluation folder, and which files those are


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark and its files."""

    benchmark: Benchmark
    folder: Path = Path()
    question_file: Path = Path()
    image_folder: Path | None = None  # None: the pictures are in the question file
    # why it can't be scored here (its server has the truth); "": it can
    unscored: str = ""
    missing: str = ""  # which files were not found, so that it can't run; "": it can


def plans(names: list[str], root: Path, generated: Path) -> list[Task]:
    """The plan of every named benchmark, or of all, in ``root``, a file of own questions or LLaVA's
    evaluation folder. ``generated``: folder for generated question files. Raises ValueError for an
    unknown name."""
    if root.is_file():
        return [plan_folder(benchmark("questions"), root, generated)]
    for name in names:
        benchmark(name)
    return [
        plan_below(member, root, generated)
        for name, member in benchmarks().items()
        if not names or name in names
    ]


def plan_below(member: Benchmark, root: Path, generated: Path) -> Task:
    """The first of a benchmark's folders below ``root`` that has its files."""
    folders = [root / folder for folder in member.folders if (root / folder).is_dir()]
    if not folders:
        missing = f"no folder {' or '.join(member.folders)} in {root}"
        return Task(benchmark=member, missing=missing)
    tasks = [plan_folder(member, folder, generated) for folder in folders]
    for task in tasks:
        if not task.missing:
            return task
    return Task(benchmark=member, missing="; ".join(task.missing for task in tasks))


def plan_folder(member: Benchmark, folder: Path, generated: Path) -> Task:
    """Look for a benchmark's files in one folder."""
    unscored = ""
    try:
        with errors_about(
            f"the {member.title} files in {folder}", fix="download them again"
        ):
            member.load(folder)
    except (FileNotFoundError, ValueError) as error:
        unscored = str(error)
    questions = question_file(member, folder, generated, scored=not unscored)
    if unscored and (questions is None or not member.submission_format):
        return Task(benchmark=member, missing=unscored)
    if questions is None:
        return Task(
            benchmark=member,
            missing=f"{folder} has no question file {' or '.join(member.question_files)}",
        )
    images = None
    if questions.suffix != ".tsv":  # tables hold their pictures
        with errors_about(questions, fix="download it again"):
            is_json = questions.suffix == ".json"
            rows = read_json_value(questions) if is_json else read_jsonl(questions)
            names = [row["image"] for row in rows if row.get("image")]
        if not folder.is_file():
            names = names[:3]  # of a benchmark, which is whole or not there
        above = folder.parent if folder.is_file() else folder
        folders = [above / below for below in member.image_folders]
        images = next((images for images in folders if has_files(images, names)), None)
        if images is None:
            asked = folder if folder.is_file() else questions
            missing = missing_pictures(asked.name, names, folders)
            return Task(benchmark=member, missing=missing)
    return Task(
        benchmark=member,
        folder=folder,
        question_file=questions,
        image_folder=images,
        unscored=unscored,
    )


def missing_pictures(questions: str, names: list[str], folders: list[Path]) -> str:
    """Why none of the folders has the pictures that a file of questions names."""
    absent = [name for name in names if not (folders[0] / name).is_file()]
    if not absent:
        return f"{questions} names no pictures"
    places = " or ".join(map(str, folders))
    return f"pictures of {questions} are missing, such as {absent[0]} in {places}"


def has_files(folder: Path, names: list[str]) -> bool:
    """Whether a folder has all of at least one file."""
    return bool(names) and all((folder / name).is_file() for name in names)


def question_file(
    member: Benchmark, folder: Path, generated: Path, *, scored: bool
) -> Path | None:
    """LLaVA's question file; for a split with annotations but without one, a file generated from
    the annotations."""
    if not scored or not member.scored_question_files:
        return first_file(folder, *member.question_files)
    path = first_file(folder, *member.scored_question_files)
    if path is None and (rows := member.question_rows(folder)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        return write_text(generated / f"{member.name}_val.jsonl", text)
    return path


# The programs that answer, each in a process of its own: `llm2clip llava evaluate` and lmms-eval


def run_logged(
    words: list[str], log: Path, is_done: Callable[[], Any], folder: Path | None = None
) -> None:
    """Run a command in a folder, copy its output to stderr and a file. RuntimeError if it fails, or
    wrote no results. lmms-eval ends with status 0 after an error."""
    print(shlex.join(words), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    # transformers otherwise lists the names of all the tower's weights, which the tower loads
    # itself
    environment = child_environment(TRANSFORMERS_VERBOSITY="error")
    options: dict[str, Any] = {
        "stderr": subprocess.STDOUT,
        "env": environment,
        "cwd": folder,
    }
    with (
        log.open("ab") as file,
        subprocess.Popen(words, stdout=subprocess.PIPE, **options) as process,
    ):
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            os.write(2, chunk)
            file.write(chunk)
    if process.returncode or not is_done():
        lines = (
            log.read_text(encoding="utf-8", errors="replace")
            .replace("\r", "\n")
            .split("\n")
        )
        last = next(
            (line.strip()[-300:] for line in reversed(lines) if line.strip()), ""
        )
        raise RuntimeError(
            f"exit status {process.returncode} without results; last line: {last!r}; log: {log}"
        )


def evaluate_command(task: Task, args: BenchConfig, output: Path) -> list[str]:
    """The command line of ``llm2clip llava evaluate``, under torchrun with several GPUs."""
    words = on_ranks(args.gpus, "llm2clip_plugin.cli", "llava", "evaluate")
    words += ["--answers-file", str(output), "--question-file", str(task.question_file)]
    words += task.benchmark.evaluate_options
    names = ["model_path", "model_base", "conv_mode", "device", "batch_size", "dtype"]
    if args.endpoint:
        names = ["endpoint", "served_model_name"]
    for name in names:
        if value := getattr(args, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    if task.image_folder is not None:
        words += ["--image-folder", str(task.image_folder)]
    if args.blind:
        words.append("--blind")
    if args.overwrite:
        words.append("--overwrite")
    return [*words, *args.engine_options]


LOGS = "lmms_eval"  # folder of lmms-eval's logs, which `compare` reads
TODAY = (
    "cv_bench",
    "mmvp",
    "blink",
    "realworldqa",
    "mmstar",
    "chartqa",
    "docvqa_val",
    "ai2d",
    "mmmu_val",
)


def run_lmms_eval(task: str, args: BenchConfig) -> Outcome:
    """One task of lmms-eval, unless its logs are there: they are written at its very end. Read as
    `compare` reads them. It runs in ``args.data``, since Hugging Face's
    ``load_dataset("OWNER/NAME")`` takes a folder of that name first."""
    folder = args.output / LOGS / task
    words = lmms_eval_command(task, args)
    log = args.output / "logs" / f"{task}.log"
    record = log.with_name(f"{task}.model")
    if args.overwrite and folder.is_dir():
        if not record.is_file():
            problem = f"{folder} has files that `llm2clip bench-mllm` did not write (no {record})"
            raise FileExistsError(
                f"{problem}, and --overwrite would delete them; choose another --output"
            )
        shutil.rmtree(folder)
    model = f"{args.model_path} {sample_sha256(args.model_path)}"
    options = f"--conv-mode {args.conv_mode} {shlex.join(args.engine_options)}".rstrip()
    if not read_logs(folder):
        write_text(record, f"{model}\n{options}")
        run_logged(words, log, lambda: read_logs(folder), args.data)
    elif record.is_file():
        model_before, _, options_before = record.read_text().partition("\n")
        changes = [(model_before, model)]
        if options_before:  # which an earlier release did not record
            changes.append((options_before, options))
        for before, now in changes:
            if before != now:
                raise ContractError(
                    f"{folder} has logs of {before}, not of {now}; "
                    "pass --overwrite or another --output"
                )
    runs = [run_of(path, record) for path, record in read_logs(folder)]
    values = [run.statistic.full() for run in runs]
    results = [
        f"{run.title}: {report.number(value, run.unit)} {run.unit}"
        for run, value in zip(runs, values, strict=True)
    ]
    return Outcome(
        name=task, status="scored", value=values[0], detail="; ".join(results)
    )


def is_llavas(model: str) -> bool:
    """Whether LLaVA's own code opens the model, not transformers'; so, too, one of the Hub that is
    not llava-hf's."""
    config = config_of(model)
    return "mm_vision_tower" in config or not (config or model.startswith("llava-hf/"))


def lmms_eval_command(task: str, args: BenchConfig) -> list[str]:
    """The command line of lmms-eval: its ``llava`` for a checkpoint of LLaVA's code, ``llava_hf``
    for transformers'."""
    path = Path(args.model_path).expanduser()
    checkpoint = str(path.resolve()) if path.is_dir() else args.model_path
    device = "cuda" if args.device == "auto" else args.device
    model_args = [f"pretrained={checkpoint}", f"device={device}"]
    if is_llavas(args.model_path):
        model = "llava"
        model_args.append(f"conv_template={args.conv_mode}")
        if device == "cpu":
            model_args.append("device_map=auto")
    else:
        model = "llava_hf"
        if args.gpus == 1:
            model_args.append(f"device_map={device}")
    start = python_module("lmms_eval")
    if args.gpus > 1:
        launcher = ("--num_processes", str(args.gpus), "--no_python")
        start = python_module("accelerate.commands.launch", *launcher, *start)
    return [
        *start,
        "--model",
        model,
        "--model_args",
        ",".join(model_args),
        "--tasks",
        task,
        "--batch_size",
        str(args.batch_size),
        "--log_samples",
        "--output_path",
        str((args.output / LOGS / task).resolve()),
        *args.engine_options,
    ]
