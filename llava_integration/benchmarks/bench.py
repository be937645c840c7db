"""``llm2clip score``: one answers file; ``llm2clip bench-mllm``: one model on every benchmark whose files are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from llava_integration.answer.questions import ModelConfig, settings_file
from llava_integration.benchmarks.answers import Answers, read_answers, read_jsonl
from llava_integration.benchmarks.benchmark import ALLOWED, Benchmark, first_file
from llava_integration.benchmarks.rules import benchmark, benchmarks
from llava_integration.benchmarks.rules.judged import reviewed
from llava_integration.checkpoints import check_checkpoint, config_of
from llava_integration.compare import report
from llava_integration.compare.readers import read_logs
from llava_integration.compare.sides import run_of
from llava_integration.compat.runner import installed_version
from llm2clip_plugin.contracts import ScoreFile, atomic_file, sha256_file
from llm2clip_plugin.files import errors_about, printable_lines, read_json_value
from llm2clip_plugin.options import Command, command

LIBRARIES = ("llm2clip-plugin", "llava-torch", "llava", "torch", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """An answers file to score."""

    benchmark: str  # one of these names
    data: Path  # LLaVA's evaluation folder of the benchmark, or a .jsonl with own questions
    answers: Path  # of LLaVA's scripts, a folder of its chunks, or a submission file
    output: Path | None = None  # score file to write
    submission: Path | None = None  # file to write for the benchmark's server
    reviews: Path | None = None  # the judge's file, of a benchmark that has a judge
    model: str = ""  # the model's name in reports; "": from the answers file
    # largest fraction of missing, duplicate, unreadable or unknown answers; without a value: 1.0
    allow_missing: float = ALLOWED

    def __post_init__(self) -> None:
        if not 0 <= self.allow_missing <= 1:
            raise ValueError(f"--allow-missing {self.allow_missing} must be a fraction between 0 and 1")


SCORE = Command(
    name="score",
    example="llm2clip score textvqa playground/data/eval/textvqa --answers answers.jsonl --output textvqa.scores.json",
    about="Score one answers file against a benchmark's annotations, by the official rule. BENCHMARK is one of "
    f"{', '.join(benchmarks())}.",
    settings=ScoreConfig,
    arguments="benchmark data",
    also={"json": "output"},
    alone={"allow_missing": "1"},
)


def score_answers(
    name: str, data: Path, answers: Answers, *, allow: float = ALLOWED, reviews: Path | None = None, model: str = ""
) -> ScoreFile:
    """Score answers, and record what they were made from; ``reviews``: the judge's file, if there is a judge.

    Raises ValueError for answers to another benchmark.
    """
    member = benchmark(name)
    given = reviewed(member, answers, reviews) if member.judge else answers
    record = member.score(data, given, allow=allow)
    settings = settings_file(answers.path)
    provenance = {
        **({"answer_settings": read_json_value(settings)} if settings.is_file() else {}),
        "data": str(data.resolve()),
        "data_sha256": member.data_digest(data),
        "answers": str(answers.path),
        "answers_sha256": {str(answers.path): sha256_file(answers.path)} if answers.path.is_file() else {},
        "layout": answers.layout,
        "versions": {name: installed for name in LIBRARIES if (installed := installed_version(name))},
    }
    return replace(record, model=model or record.model, provenance=provenance)


def describe(member: Benchmark, record: ScoreFile) -> str:
    """Headline, counts above zero, notes, the other metrics."""
    value = record.metrics[member.headline]
    lines = [f"{member.title} of {record.model}: {value * member.scale:.2f} {member.unit}   ({member.headline})"]
    lines.append("  " + ", ".join(f"{name} {count}" for name, count in record.counts.items() if count))
    lines += [f"  note: {note}" for note in record.notes]
    width = max((len(name) for name in record.metrics), default=0)
    lines += [f"  {name:<{width}}  {number:.10g}" for name, number in record.metrics.items()]
    return "\n".join(lines)


def main_score(argv: list[str]) -> int:
    """Score one answers file."""
    args = SCORE.parse(argv)
    member = benchmark(args.benchmark)
    answers = read_answers(args.answers)
    if args.submission:
        if not member.submission_format:
            raise ValueError(f"{args.benchmark} has no server to submit to; remove --submission")
        member.write_submission(args.data, answers, args.submission)
        print(f"wrote {args.submission} for the server of {member.title}", file=sys.stderr)
        if not args.output:
            return 0
    record = score_answers(
        args.benchmark, args.data, answers, allow=args.allow_missing, reviews=args.reviews, model=args.model
    )
    if args.output:  # before printing, which `| head` may end
        record.write(args.output)
        print(f"wrote {args.output}", file=sys.stderr)
    print(printable_lines(describe(member, record)))
    return 0


@dataclass(frozen=True, kw_only=True)
class BenchConfig(ModelConfig):
    """A model and the benchmarks to evaluate it on."""

    data: Path  # LLaVA's playground/data/eval, or a .jsonl with own questions
    output: Path  # folder for answers, scores and logs
    benchmarks: tuple[str, ...] = ()  # names; empty: all whose files are found
    engine: Literal["llava", "lmms-eval"] = "llava"  # program that generates the answers
    gpus: int = 1  # number of processes, one GPU each
    name: str = ""  # model name in score files; "": the checkpoint's folder, or its name on the server
    plan: bool = False  # only list the benchmarks whose files are found
    engine_options: tuple[str, ...] = ()  # after --, for the engine


COMMAND = Command(
    name="bench-mllm",
    example="llm2clip bench-mllm playground/data/eval --model-path checkpoints/llava-7b --output runs/llava-7b",
    about="Evaluate one LLaVA checkpoint, or a served model, on every benchmark whose files are found: "
    f"{', '.join(benchmarks())}. Answers, scores and logs are written to --output; completed ones are skipped on "
    "a rerun, and a benchmark that fails does not stop the others. Options after -- are passed to the engine "
    "(llava evaluate, or lmms_eval).",
    settings=BenchConfig,
    arguments="data",
    everyday="model-path endpoint output benchmarks engine gpus batch-size overwrite plan",
    rest="engine_options",
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one benchmark."""

    name: str
    status: str  # scored | answered (to be scored by a server or a judge) | no files | failed
    detail: str = ""
    value: float | None = None
    seconds: float = 0.0


def main(argv: list[str]) -> int:
    """Run the benchmarks; 1 if one of them failed, 0 otherwise."""
    args = COMMAND.parse(argv)
    if args.engine == "lmms-eval" and find_spec("lmms_eval") is None:
        raise ValueError("lmms-eval is not installed in this environment; pip install lmms-eval, or use --engine llava")
    if args.model_path:
        check_checkpoint(args.model_path, args.model_base)
    tasks = plans(list(args.benchmarks), args.data, args.output / "questions")
    if args.engine == "lmms-eval":
        lacking = "lmms-eval's log has no score of each question"
        tasks = [one if one.benchmark.lmms_eval_task else replace(one, missing=lacking) for one in tasks]
    print(describe_plan(tasks))
    if all(task.missing for task in tasks):
        raise FileNotFoundError(f"no benchmark can run with the files in {args.data}; the reasons are listed above")
    if args.plan:
        return 0
    if args.engine == "llava" and not args.endpoint and find_spec("llava") is None:
        raise ValueError("LLaVA is not installed here: pip install --no-deps llava-torch==1.2.2.post1")
    outcomes = [run_one(task, args) for task in tasks]
    table = [(one.name, one.status, f"{one.seconds:.0f} s" * bool(one.seconds), one.detail) for one in outcomes]
    print("\n" + "\n".join(report.aligned(("benchmark", "status", "time", "result"), table)))
    with atomic_file(args.output / "bench.json") as temporary:
        temporary.write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=2) + "\n", encoding="utf-8")
    compare = command("compare", "BASE/scores", args.output / "scores", "--output", "report")
    print(f"\ncompare two towers: {compare}", file=sys.stderr)
    return int(any(outcome.status == "failed" for outcome in outcomes))


def describe_plan(tasks: list[Task]) -> str:
    """The benchmarks that will run, and why the others will not."""
    rows = []
    for task in tasks:
        remark = f"; answers only: {task.unscored}" if task.unscored else "; needs a judge" * bool(task.benchmark.judge)
        state, about = ("no files", task.missing) if task.missing else ("will run", f"{task.question_file}{remark}")
        rows.append((task.benchmark.name, state, about))
    return "\n".join(report.aligned(("benchmark", "", "files"), rows))


def run_one(task: Task, args: BenchConfig) -> Outcome:
    """Evaluate and score one benchmark; an error of any kind is its outcome and does not stop the run."""
    name = task.benchmark.name
    if task.missing:
        return Outcome(name=name, status="no files", detail=task.missing)
    started = time.monotonic()
    print(f"\n== {task.benchmark.title}", flush=True)
    try:
        outcome = score_task(task, args, *make_answers(task, args))
    except Exception as error:
        log = args.output / "logs" / f"{name}.error.txt"
        with atomic_file(log) as temporary:
            temporary.write_text(traceback.format_exc(), encoding="utf-8")
        outcome = Outcome(name=name, status="failed", detail=f"{error} (traceback: {log})")
    print(f"{outcome.status}: {outcome.detail}", flush=True)
    return replace(outcome, seconds=round(time.monotonic() - started, 1))


def score_task(task: Task, args: BenchConfig, path: Path, answered_by: list[str]) -> Outcome:
    """Score the answers and write the score file; if only the server has the truth, write the server's file."""
    member, name = task.benchmark, task.benchmark.name
    if args.engine == "lmms-eval":  # which has scored them by rules of its own
        ((_, record),) = read_logs(path)
        run = run_of(path, record)
        value, unit = run.statistic.full(), run.unit
        record = replace(record, model=args.name or Path(args.model_path).name, metrics={run.title: value})
    else:
        answers = read_answers(path)
        if member.judge:
            score = command("score", name, task.folder, "--answers", path, "--reviews", "FILE")
            return Outcome(name=name, status="answered", detail=f"needs a judge: {score}")
        if task.unscored:
            upload = args.output / "submissions" / f"{name}.{member.submission_format}"
            member.write_submission(task.folder, answers, upload)
            return Outcome(name=name, status="answered", detail=f"to be scored by its server: {upload}")
        model = args.name or (answers.model if args.endpoint else Path(args.model_path).name)
        record = score_answers(name, task.folder, answers, model=model)
        record.provenance["question_file_sha256"] = sha256_file(task.question_file)
        value, unit = record.metrics[member.headline] * member.scale, member.unit
    record.provenance["command"] = answered_by
    if args.model_path:
        config = config_of(args.model_path)
        record.provenance.update(
            checkpoint=args.model_path,
            llm=config.get("_name_or_path", ""),
            tower=config.get("mm_vision_tower", ""),
            tower_sha256=(config.get("llm2clip_tower") or {}).get("weights_sha256", ""),
        )
    record.write(args.output / "scores" / f"{name}.scores.json")
    detail = f"{report.number(value, unit)} {unit}" + f" ({'; '.join(record.notes)})" * bool(record.notes)
    return Outcome(name=name, status="scored", value=value, detail=detail)


# Which benchmarks have their files in LLaVA's evaluation folder, and which files those are


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark and its files."""

    benchmark: Benchmark
    folder: Path = Path()
    question_file: Path = Path()
    image_folder: Path | None = None  # None: the pictures are in the question file
    unscored: str = ""  # why it can't be scored here (its server has the truth); "": it can
    missing: str = ""  # which files were not found, so that it can't run; "": it can


def plans(names: list[str], root: Path, generated: Path) -> list[Task]:
    """The plan of every named benchmark, or of all; ``generated``: folder for generated question files.

    A file ``root`` holds own questions; a folder is LLaVA's evaluation folder. Raises ValueError for an unknown name.
    """
    if root.is_file():
        return [plan_folder(benchmark("questions"), root, generated)]
    for name in names:
        benchmark(name)
    tasks = []
    for name, member in benchmarks().items():
        if not names or name in names:
            folders = [root / folder for folder in member.folders if (root / folder).is_dir()]
            found = [plan_folder(member, folder, generated) for folder in folders]
            reasons = [task.missing for task in found] or [f"no folder {' or '.join(member.folders)} in {root}"]
            nothing = Task(benchmark=member, missing="; ".join(reasons))
            tasks.append(next((task for task in found if not task.missing), nothing))
    return tasks


def plan_folder(member: Benchmark, folder: Path, generated: Path) -> Task:
    """Look for a benchmark's files in one folder."""
    unscored = ""
    try:
        with errors_about(f"the {member.title} files in {folder}", fix="download them again"):
            member.load(folder)
    except (FileNotFoundError, ValueError) as error:
        unscored = str(error)
    questions = question_file(member, folder, generated, scored=not unscored)
    if unscored and (questions is None or not member.submission_format):
        return Task(benchmark=member, missing=unscored)
    if questions is None:
        return Task(benchmark=member, missing=f"{folder} has no question file {' or '.join(member.question_files)}")
    images = None
    if questions.suffix != ".tsv":  # tables hold their pictures
        with errors_about(questions, fix="download it again"):
            rows = read_json_value(questions) if questions.suffix == ".json" else read_jsonl(questions)
            names = [row["image"] for row in rows if row.get("image")][:3]  # the first will do
        above = folder.parent if folder.is_file() else folder
        places = [above / below for below in member.image_folders]
        images = next((one for one in places if names and all((one / name).is_file() for name in names)), None)
        if images is None:
            missing = f"the pictures of {questions.name} are not in {' or '.join(map(str, places))}"
            return Task(benchmark=member, missing=missing)
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


# The programs that generate a benchmark's answers, run in a subprocess: `llm2clip llava evaluate` and lmms-eval


def make_answers(task: Task, args: BenchConfig) -> tuple[Path, list[str]]:
    """Run the engine in a subprocess; returns the path of the answers, or of lmms-eval's log, and the command."""
    name, task_name = task.benchmark.name, task.benchmark.lmms_eval_task
    if args.engine == "lmms-eval":
        folder = args.output / "lmms_eval" / name
        command, pattern = lmms_eval_command(task, args, folder), f"**/*_samples_{task_name}.jsonl"
        if logs := [] if args.overwrite else sorted(folder.glob(pattern)):  # written at the very end of its run
            return logs[-1], command
    else:
        folder, pattern = args.output / "answers", f"{name}.jsonl"
        command = evaluate_command(task, args, folder / pattern)
    print(" ".join(command), flush=True)
    log = args.output / "logs" / f"{name}.log"
    status, last = run_logged(command, log)
    written = sorted(folder.glob(pattern))
    if status or not written:  # lmms-eval ends with status 0 after an error
        raise RuntimeError(
            f"{args.engine} exited with status {status} without answers; last line: {last!r}; log: {log}"
        )
    return written[-1], command


def run_logged(command: list[str], log: Path) -> tuple[int, str]:
    """Run a command, copy its output to stderr and a file; returns its exit status and last line."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # transformers otherwise lists the names of all the tower's weights, which the tower loads itself
    environment = {"TRANSFORMERS_VERBOSITY": "error", **os.environ}
    with (
        log.open("ab") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            os.write(2, chunk)
            file.write(chunk)
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    return process.returncode, next((line.strip()[-300:] for line in reversed(lines) if line.strip()), "")


def evaluate_command(task: Task, args: BenchConfig, output: Path) -> list[str]:
    """The command line of ``llm2clip llava evaluate``, under torchrun with several GPUs."""
    words = [sys.executable, "-m"]
    if args.gpus > 1:
        words += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(args.gpus), "-m"]
    words += ["llm2clip_plugin.cli", "llava", "evaluate"]
    words += ["--answers-file", str(output), "--question-file", str(task.question_file)]
    words += task.benchmark.evaluate_options
    names = "model_path model_base conv_mode device batch_size dtype".split()
    for name in ("endpoint", "served_model_name") if args.endpoint else names:
        if value := getattr(args, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    if task.image_folder is not None:
        words += ["--image-folder", str(task.image_folder)]
    return [*words, *(["--overwrite"] if args.overwrite else []), *args.engine_options]


def lmms_eval_command(task: Task, args: BenchConfig, output: Path) -> list[str]:
    """The command line of lmms-eval, which downloads its own questions and pictures."""
    model = f"pretrained={args.model_path},conv_template={args.conv_mode}"
    if args.device != "auto":
        model += f",device={args.device}" + ",device_map=auto" * (args.device == "cpu")
    start = [sys.executable, "-m"]
    if args.gpus > 1:
        start += ["accelerate.commands.launch", "--num_processes", str(args.gpus), "-m"]
    return [
        *start, "lmms_eval", "--model", "llava", "--model_args", model, "--tasks", task.benchmark.lmms_eval_task,
        "--batch_size", str(args.batch_size), "--log_samples", "--log_samples_suffix", task.benchmark.name,
        "--output_path", str(output), *args.engine_options,
    ]  # fmt: skip
