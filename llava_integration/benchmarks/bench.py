"""``llm2clip bench-mllm``: evaluate one LLaVA checkpoint on every benchmark whose files are found."""

import json
import sys
import time
import traceback
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from llava_integration.benchmarks.answers import read_answers
from llava_integration.benchmarks.base import Options
from llava_integration.benchmarks.bench_options import COMMAND, BenchConfig
from llava_integration.benchmarks.engine import make_answers
from llava_integration.benchmarks.plan import Missing, Task, plans
from llava_integration.benchmarks.provenance import run_provenance
from llava_integration.benchmarks.score import score_answers
from llava_integration.compare import tables
from llava_integration.towers.checkpoint_files import check_checkpoint
from llava_integration.towers.checkpoint_name import refuse_name
from llm2clip_plugin.commands import command
from llm2clip_plugin.contracts import atomic_file


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one benchmark."""

    name: str
    status: str  # scored | answered (to be scored by a server or a judge) | no files | failed
    detail: str = ""
    value: float | None = None
    seconds: float = 0.0


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks; 1 if one of them failed, 0 otherwise."""
    args = COMMAND.parse(sys.argv[1:] if argv is None else argv)
    if args.engine == "lmms-eval" and find_spec("lmms_eval") is None:
        raise ValueError("lmms-eval is not installed in this environment; pip install lmms-eval, or use --engine llava")
    if args.model_path:
        refuse_name(args.model_path, base=args.model_base)
        check_checkpoint(args.model_path, args.model_base)
    tasks = plans(list(args.benchmarks), args.data, args.output / "questions")
    print(describe_plan(tasks))
    if not any(isinstance(task, Task) for task in tasks):
        raise FileNotFoundError(f"no benchmark can run with the files in {args.data}; the reasons are listed above")
    if args.plan:
        return 0
    if args.engine == "llava" and not args.endpoint and find_spec("llava") is None:
        raise ValueError(
            "LLaVA is not installed in this environment; to install it: pip install --no-deps llava-torch==1.2.2.post1 "
            "(`llm2clip doctor` lists what else is missing), or run bench-mllm where it is installed"
        )
    outcomes = [run_one(task, args) for task in tasks]
    print("\n" + describe(outcomes))
    with atomic_file(args.output / "bench.json") as temporary:
        temporary.write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=2) + "\n", encoding="utf-8")
    compare = command("compare", "BASE/scores", args.output / "scores", "--output", "report")
    print(f"\ncompare two towers: {compare}", file=sys.stderr)
    return int(any(outcome.status == "failed" for outcome in outcomes))


def describe_plan(tasks: list[Task | Missing]) -> str:
    """The benchmarks that will run, and why the others will not."""
    rows = []
    for task in tasks:
        if isinstance(task, Missing):
            rows.append((task.benchmark.name, "no files", task.reason))
            continue
        remarks = [str(task.question_file)]
        if task.unscored:
            remarks.append(f"answers only: {task.unscored}")
        elif task.benchmark.judge:
            remarks.append("needs a judge")
        rows.append((task.benchmark.name, "will run", "; ".join(remarks)))
    return "\n".join(tables.aligned(("benchmark", "", "files"), rows))


def run_one(task: Task | Missing, args: BenchConfig) -> Outcome:
    """Evaluate and score one benchmark; an error of any kind is its outcome and does not stop the run."""
    name = task.benchmark.name
    if isinstance(task, Missing):
        return Outcome(name=name, status="no files", detail=task.reason)
    started = time.monotonic()
    print(f"\n== {task.benchmark.title}", flush=True)
    try:
        answers, answered_by = make_answers(task, args)
        outcome = score_task(task, args, answers, answered_by)
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
    answers = read_answers(path, tasks=member.lmms_eval_tasks)
    if member.judge:
        score = command("score", name, task.folder, "--answers", path, "--reviews", "FILE")
        return Outcome(name=name, status="answered", detail=f"needs a judge: {score}")
    if task.unscored:
        upload = args.output / "submissions" / f"{name}.{member.submission_format}"
        member.write_submission(task.folder, answers, upload)
        return Outcome(name=name, status="answered", detail=f"to be scored by its server: {upload}")
    model = args.name or (answers.model if args.endpoint else Path(args.model_path).name)
    record = score_answers(name, task.folder, answers, Options(corrected=True), model=model)
    record.provenance.update(run_provenance(args.model_path, task.question_file, answered_by))
    record.write(args.output / "scores" / f"{name}.scores.json")
    value = record.metrics[member.headline] * member.scale
    detail = f"{tables.number(value, member.unit)} {member.unit}"
    detail += f" ({'; '.join(record.notes)})" if record.notes else ""
    return Outcome(name=name, status="scored", value=value, detail=detail)


def describe(outcomes: list[Outcome]) -> str:
    """The table at the end."""
    rows = [(o.name, o.status, f"{o.seconds:.0f} s" if o.seconds else "", o.detail) for o in outcomes]
    return "\n".join(tables.aligned(("benchmark", "status", "time", "result"), rows))


if __name__ == "__main__":
    sys.exit(main())
