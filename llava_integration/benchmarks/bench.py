"""``llm2clip bench-mllm``: evaluate one LLaVA checkpoint on every benchmark whose files are found.

Answers, scores and logs are written to --output; completed ones are skipped on a rerun, and a benchmark that fails does
not stop the others. Options after ``--`` are passed to the engine (llava_integration.evaluate, or lmms_eval).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llava_integration.benchmarks.answers import read_answers
from llava_integration.benchmarks.base import Options
from llava_integration.benchmarks.plan import Missing, Task, plans
from llava_integration.benchmarks.rules import benchmarks
from llava_integration.benchmarks.score import score_answers
from llava_integration.compare import tables
from llm2clip_plugin.contracts import atomic_file, sha256_file, sha256_text

LIBRARIES = ("llm2clip-plugin", "llava-torch", "llava", "torch", "transformers", "numpy", "lmms-eval")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one benchmark."""

    name: str
    status: str  # scored | answered (to be scored by a server or a judge) | no files | failed
    detail: str = ""
    value: float | None = None
    seconds: float = 0.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        prog="llm2clip bench-mllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("--model-path", required=True, help="LLaVA checkpoint: full, LoRA or projector")
    parse.add_argument("--model-base", default="", help="base model of a LoRA or projector checkpoint")
    parse.add_argument("--data", required=True, type=Path, help="LLaVA's playground/data/eval")
    parse.add_argument("--output", required=True, type=Path, help="folder for answers, scores and logs")
    parse.add_argument(
        "--benchmarks", nargs="+", default=[], metavar="NAME", help=f"default: all of {', '.join(benchmarks())}"
    )
    parse.add_argument(
        "--engine", choices=("llava", "lmms-eval"), default="llava", help="program that generates the answers"
    )
    parse.add_argument("--gpus", type=int, default=1, help="number of processes, one GPU each")
    parse.add_argument("--batch-size", type=int, default=1, help="questions in a batch")
    parse.add_argument("--conv-mode", default="vicuna_v1", help="conversation template")
    parse.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parse.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parse.add_argument("--name", default="", help="model name in score files (default: the checkpoint's folder name)")
    parse.add_argument("--overwrite", action="store_true", help="generate existing answers again")
    parse.add_argument("--plan", action="store_true", help="only list the benchmarks whose files are found")
    return parse


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks; 1 if one of them failed, 0 otherwise."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    args, extra = parser().parse_args(words[:split]), words[split + 1 :]
    if args.engine == "lmms-eval" and find_spec("lmms_eval") is None:
        raise ValueError("lmms-eval is not installed in this environment; pip install lmms-eval, or use --engine llava")
    tasks = plans(args.benchmarks, args.data, args.output / "questions")
    print(describe_plan(tasks))
    if not any(isinstance(task, Task) for task in tasks):
        raise FileNotFoundError(f"no benchmark has its files in {args.data}; the reasons are listed above")
    if args.plan:
        return 0
    if args.engine == "llava" and find_spec("llava") is None:
        raise ValueError(
            "LLaVA is not installed in this environment; run bench-mllm in LLaVA's environment (see `llm2clip doctor`)"
        )
    outcomes = [run_one(task, args, extra) for task in tasks]
    print("\n" + describe(outcomes))
    with atomic_file(args.output / "bench.json") as temporary:
        temporary.write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=2) + "\n", encoding="utf-8")
    print(f"\ncompare two towers: llm2clip compare BASE/scores {args.output / 'scores'} --out report", file=sys.stderr)
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


def run_one(task: Task | Missing, args: argparse.Namespace, extra: list[str]) -> Outcome:
    """Evaluate and score one benchmark; an error of any kind is its outcome and does not stop the run."""
    name = task.benchmark.name
    if isinstance(task, Missing):
        return Outcome(name=name, status="no files", detail=task.reason)
    started = time.monotonic()
    print(f"\n== {task.benchmark.title}", flush=True)
    try:
        answers, command = make_answers(task, args, extra)
        outcome = score_task(task, args, answers, command)
    except Exception as error:
        log = args.output / "logs" / f"{name}.error.txt"
        with atomic_file(log) as temporary:
            temporary.write_text(traceback.format_exc(), encoding="utf-8")
        outcome = Outcome(name=name, status="failed", detail=f"{error} (traceback: {log})")
    print(f"{outcome.status}: {outcome.detail}", flush=True)
    return replace(outcome, seconds=round(time.monotonic() - started, 1))


class EngineError(RuntimeError):
    """The engine failed to generate the answers."""


def make_answers(task: Task, args: argparse.Namespace, extra: list[str]) -> tuple[Path, list[str]]:
    """Run the engine in a subprocess; returns the path of the answers and the command."""
    if args.engine == "lmms-eval":
        output = args.output / "lmms_eval" / task.benchmark.name
        command = lmms_eval_command(task, args, extra, output)
        logs = [path for known in task.benchmark.lmms_eval_tasks for path in output.glob(f"**/*_samples_{known}.jsonl")]
        if logs and not args.overwrite:  # written at the very end of its run
            return output, command
    else:
        output = args.output / "answers" / f"{task.benchmark.name}.jsonl"
        command = evaluate_command(task, args, extra, output)
    print(" ".join(command), flush=True)
    log = args.output / "logs" / f"{task.benchmark.name}.log"
    status, last = run_logged(command, log)
    if status or not output.exists():  # lmms-eval ends with status 0 after an error
        raise EngineError(f"{args.engine} exited with status {status} without answers; last line: {last!r}; log: {log}")
    return output, command


def run_logged(command: list[str], log: Path) -> tuple[int, str]:
    """Run a command, copy its output to stderr and a file; returns its exit status and last line."""
    log.parent.mkdir(parents=True, exist_ok=True)
    tail = b""
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
            tail = (tail + chunk)[-4000:]
    lines = tail.decode(errors="replace").replace("\r", "\n").split("\n")
    return process.returncode, next((line.strip()[-300:] for line in reversed(lines) if line.strip()), "")


def evaluate_command(task: Task, args: argparse.Namespace, extra: list[str], output: Path) -> list[str]:
    """The command line of llava_integration.evaluate, under torchrun with several GPUs."""
    start = [sys.executable, "-m"]
    if args.gpus > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(args.gpus), "-m"]
    words = [
        *start, "llava_integration.evaluate", "--model-path", args.model_path, "--answers-file", str(output),
        "--question-file", str(task.question_file), "--conv-mode", args.conv_mode, "--device", args.device,
        "--batch-size", str(args.batch_size), "--dtype", args.dtype, *task.benchmark.evaluate_options,
    ]  # fmt: skip
    if args.model_base:
        words += ["--model-base", args.model_base]
    if task.image_folder is not None:
        words += ["--image-folder", str(task.image_folder)]
    return [*words, *(["--overwrite"] if args.overwrite else []), *extra]


def lmms_eval_command(task: Task, args: argparse.Namespace, extra: list[str], output: Path) -> list[str]:
    """The command line of lmms-eval, which downloads its own questions and pictures."""
    model = f"pretrained={args.model_path},conv_template={args.conv_mode}"
    if args.device != "auto":
        model += f",device={args.device}" + ",device_map=auto" * (args.device == "cpu")
    start = [sys.executable, "-m"]
    if args.gpus > 1:
        start += ["accelerate.commands.launch", "--num_processes", str(args.gpus), "-m"]
    return [
        *start, "lmms_eval", "--model", "llava", "--model_args", model, "--tasks", task.benchmark.lmms_eval_tasks[0],
        "--batch_size", str(args.batch_size), "--log_samples", "--log_samples_suffix", task.benchmark.name,
        "--output_path", str(output), *extra,
    ]  # fmt: skip


def score_task(task: Task, args: argparse.Namespace, path: Path, command: list[str]) -> Outcome:
    """Score the answers and write the score file; if only the server has the truth, write the server's file."""
    member, name = task.benchmark, task.benchmark.name
    answers = read_answers(path, tasks=member.lmms_eval_tasks)
    if member.judge:
        score = f"llm2clip score {name} --data {task.folder} --answers {path} --reviews FILE"
        return Outcome(name=name, status="answered", detail=f"needs a judge: {score}")
    if task.unscored:
        upload = args.output / "submissions" / f"{name}.{member.submission_format}"
        member.write_submission(task.folder, answers, upload)
        return Outcome(name=name, status="answered", detail=f"to be scored by its server: {upload}")
    model = args.name or Path(args.model_path).name
    record = score_answers(name, task.folder, answers, Options(corrected=True), model=model)
    record.provenance.update(provenance(args.model_path, task.question_file, command))
    record.write(args.output / "scores" / f"{name}.scores.json")
    value = record.metrics[member.headline] * member.scale
    detail = f"{tables.number(value, member.unit)} {member.unit}"
    detail += f" ({'; '.join(record.notes)})" if record.notes else ""
    return Outcome(name=name, status="scored", value=value, detail=detail)


def provenance(model_path: str, question_file: Path, command: list[str]) -> dict[str, Any]:
    """What the answers were generated from: checkpoint, tower, LLM, questions, versions, command."""
    record: dict[str, Any] = {
        "checkpoint": model_path,
        "question_file": str(question_file),
        "question_file_sha256": sha256_file(question_file),
        "command": command,
        "versions": {"python": platform.python_version(), **versions()},
    }
    config = Path(model_path) / "config.json"
    if config.is_file():
        body = json.loads(config.read_text(encoding="utf-8"))
        tower = body.get("llm2clip_tower") or {}
        record |= {
            "checkpoint_config_sha256": sha256_file(config),
            "checkpoint_weights": weights_digest(Path(model_path)),
            "llm": body.get("_name_or_path", ""),
            "tower": body.get("mm_vision_tower", ""),
            "tower_sha256": tower.get("weights_sha256", ""),
        }
    return record


def weights_digest(folder: Path) -> str:
    """A hash of a checkpoint's weights that does not read gigabytes: names, sizes and first MiB of the files."""
    parts = []
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            head = file.read(1 << 20)
        parts.append(f"{path.name} {path.stat().st_size} {sha256_text(head.hex())}")
    return sha256_text("\n".join(parts))


def versions() -> dict[str, str]:
    """Installed versions of the libraries that answers depend on."""
    installed = {}
    for name in LIBRARIES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def describe(outcomes: list[Outcome]) -> str:
    """The table at the end."""
    rows = [(o.name, o.status, f"{o.seconds:.0f} s" if o.seconds else "", o.detail) for o in outcomes]
    return "\n".join(tables.aligned(("benchmark", "status", "time", "result"), rows))


if __name__ == "__main__":
    sys.exit(main())
