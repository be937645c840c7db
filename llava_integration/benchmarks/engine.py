"""The programs that generate a benchmark's answers, run in a subprocess: llava_integration.evaluate and lmms-eval."""

import os
import subprocess
import sys
from pathlib import Path

from llava_integration.benchmarks.bench_options import BenchConfig
from llava_integration.benchmarks.plan import Task


class EngineError(RuntimeError):
    """The engine failed to generate the answers."""


def make_answers(task: Task, args: BenchConfig) -> tuple[Path, list[str]]:
    """Run the engine in a subprocess; returns the path of the answers and the command."""
    if args.engine == "lmms-eval":
        output = args.output / "lmms_eval" / task.benchmark.name
        command = lmms_eval_command(task, args, output)
        logs = [path for known in task.benchmark.lmms_eval_tasks for path in output.glob(f"**/*_samples_{known}.jsonl")]
        if logs and not args.overwrite:  # written at the very end of its run
            return output, command
    else:
        output = args.output / "answers" / f"{task.benchmark.name}.jsonl"
        command = evaluate_command(task, args, output)
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


def evaluate_command(task: Task, args: BenchConfig, output: Path) -> list[str]:
    """The command line of llava_integration.evaluate, under torchrun with several GPUs."""
    start = [sys.executable, "-m"]
    if args.gpus > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(args.gpus), "-m"]
    words = [*start, "llava_integration.evaluate", *model_options(args), "--answers-file", str(output)]
    words += ["--question-file", str(task.question_file), *task.benchmark.evaluate_options]
    if task.image_folder is not None:
        words += ["--image-folder", str(task.image_folder)]
    return [*words, *(["--overwrite"] if args.overwrite else []), *args.engine_options]


def model_options(args: BenchConfig) -> list[str]:
    """The options of llava_integration.evaluate that name the model and how it runs."""
    if args.endpoint:
        named = ["--served-model-name", args.served_model_name] if args.served_model_name else []
        return ["--endpoint", args.endpoint, *named]
    words = [
        "--model-path", args.model_path, "--conv-mode", args.conv_mode, "--device", args.device,
        "--batch-size", str(args.batch_size), "--dtype", args.dtype,
    ]  # fmt: skip
    return [*words, "--model-base", args.model_base] if args.model_base else words


def lmms_eval_command(task: Task, args: BenchConfig, output: Path) -> list[str]:
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
        "--output_path", str(output), *args.engine_options,
    ]  # fmt: skip
