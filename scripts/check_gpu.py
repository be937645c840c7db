"""What this package does on this GPU: the tests marked gpu, then the benchmarks, then a Markdown table.

    scripts/check_gpu.sh [--tiny] [--minutes 10] [--output FILE]

Each check is a process of its own; one that fails or runs out of time has its last line in the table, and the others
still run. Exit status 1 if any failed. Every model is random: the speeds are real, the answers mean nothing.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import argument_parser
from bench_models import random_llama

SCRIPTS = Path(__file__).parent
LLAVA_PYTHON = SCRIPTS.parent / ".venv-llava" / "bin" / "python"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One process and what its output says."""

    title: str
    command: list[str]
    read: Callable[[str], str]  # its standard output -> the cell of the table


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row of the table."""

    title: str
    passed: bool
    text: str
    seconds: float


def checks(tiny: bool, llm: Path) -> list[Check]:
    """All checks, the most telling first: the last ones are left out if time runs out."""
    python = sys.executable
    gpu = torch.cuda.is_available()
    half = "bfloat16" if gpu else "float32"

    def script(name: str, *words: object) -> list[str]:
        return [python, str(SCRIPTS / f"{name}.py"), *map(str, words)]

    pairs = (8, 4) if tiny else (256, 64)
    step = ("--towers", "tiny", "--batch", 4, "--rounds", 2) if tiny else ("--batch", 128, "--rounds", 10)
    return [
        Check(
            title="tests marked gpu",
            command=[python, "-m", "pytest", "-q", "-m", "gpu", "tests", "--ignore=tests/llava"],
            read=last_line,
        ),
        *(
            Check(
                title=f"training step, {precision}",
                command=script("bench_step", *step, "--precision", precision),
                read=steps,
            )
            for precision in ("bf16", "fp32")
        ),
        Check(
            title="contrastive loss, blocked against all logits",
            command=script("bench_loss", "--pairs", 256 if tiny else 32768, "--repeats", 1 if tiny else 3),
            read=loss,
        ),
        Check(
            title="embed captions",
            command=script("bench_embed", "--llm", llm, "--captions", 16 if tiny else 2048, "--compute-dtype", half),
            read=lambda out: pick(out, "ours_captions_per_s", "times_faster"),
        ),
        Check(
            title="stage 1 against sentence-transformers",
            command=script(
                "bench_sentence_transformers",
                *("--llm", llm, "--batch", pairs[0], "--micro", pairs[1], "--rounds", 1 if tiny else 5),
            ),
            read=lambda out: pick(out, "pairs_per_s", "times_faster", "step_memory_mib"),
        ),
        Check(
            title="training against open_clip",
            command=script("bench_open_clip", *(("--tower", "tiny", "--batch", 4, "--steps", 2) if tiny else ())),
            read=lambda out: pick(out, "images_per_s", "times_faster"),
        ),
        Check(
            title="LLaVA's encode_images",
            command=[
                *(str(LLAVA_PYTHON), str(SCRIPTS / "bench_llava.py"), "--json"),
                *("--images", "1" if tiny else "64", "--rounds", "2" if tiny else "9"),
                *(("--dtype", "float16", "--shape", "l14-336") if gpu and not tiny else ()),
            ],
            read=lambda out: pick(out),
        ),
    ]


def run(check: Check, seconds: float) -> Result:
    """Run a check for at most ``seconds``."""
    print(f"{check.title} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    if not Path(check.command[0]).exists():
        return Result(title=check.title, passed=True, text=f"skipped: no {check.command[0]}", seconds=0.0)
    try:
        done = subprocess.run(check.command, capture_output=True, text=True, timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return Result(title=check.title, passed=False, text="out of time", seconds=time.perf_counter() - start)
    spent = time.perf_counter() - start
    if done.returncode:
        reason = last_line(done.stderr) if done.stderr.strip() else last_line(done.stdout)
        return Result(title=check.title, passed=False, text=f"exit status {done.returncode}: {reason}", seconds=spent)
    try:
        return Result(title=check.title, passed=True, text=check.read(done.stdout), seconds=spent)
    except (ValueError, KeyError, IndexError) as error:  # what it printed is not what was expected
        return Result(title=check.title, passed=False, text=f"{error}", seconds=spent)


# ------------------------------------------------------------------------------------- from outputs to cells


def last_line(output: str) -> str:
    """The last line that is not blank, of at most 300 characters."""
    return ([line for line in output.splitlines() if line.strip()] or ["no output"])[-1].strip()[:300]


def parse(output: str) -> dict[str, Any]:
    """The JSON object that ends the output, on one line or several."""
    start = output.rfind("\n{\n") + 1 if "\n{\n" in output or output.startswith("{\n") else output.rfind("\n{") + 1
    return json.loads(output[start:])


def pick(output: str, *names: str) -> str:
    """Values of the JSON object by name, all of them without names."""
    values = parse(output)
    return "; ".join(f"{name} {brief(values[name])}" for name in names or values)


def brief(value: Any) -> str:
    """A number with four digits, lists and mappings of such numbers."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {brief(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " / ".join(map(brief, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def steps(output: str) -> str:
    """A line per tower: images/s, share of the matrix products' peak, against the bare loop."""
    cells = []
    for line in output.splitlines():
        if line.startswith("{"):
            values = json.loads(line)
            cells.append(
                f"{values['tower']}: {values['batch'] / values['ours_seconds']:,.0f} images/s, "
                f"MFU {values['flop_share_of_peak']:.2f} of {values['matmul_peak_gflops'] / 1e3:,.1f} TFLOP/s, "
                f"{values['ratio']:.2f}x a bare loop, waits for data {values['wait_share']:.1%}"
            )
            if not values["losses_agree"]:
                raise ValueError(f"{values['tower']}: the first loss differs from the bare loop's")
    return "; ".join(cells)


def loss(output: str) -> str:
    """Milliseconds, peak memory, and both as ratios."""
    values = parse(output)
    blocked = values["blocked"]
    return (
        f"{values['pairs']} pairs: {blocked['seconds'] * 1e3:,.1f} ms ({values['seconds_ratio']:.2f}x), "
        f"{blocked['peak_bytes'] / 2**20:,.0f} MiB ({values['peak_bytes_ratio']:.3f}x)"
    )


def markdown(results: list[Result]) -> str:
    """The table, under a line that names the machine and the versions."""
    import deepspeed
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    lines = [
        f"{device}; {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, deepspeed {deepspeed.__version__}",
        "",
        "| check | passed | result | seconds |",
        "|---|---|---|---|",
    ]
    for result in results:
        text = result.text.replace("|", "\\|")
        lines.append(f"| {result.title} | {'yes' if result.passed else 'NO'} | {text} | {result.seconds:.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a machine without a GPU")
    parser.add_argument("--minutes", type=float, default=10.0, help="bound on the whole check")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options: argparse.Namespace = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("no GPU found (torch.cuda.is_available() is false); --tiny checks the same on a CPU")
    end = time.perf_counter() + options.minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        llm = random_llama(Path(folder) / "llm", tiny=options.tiny)
        results = [run(check, end - time.perf_counter()) for check in checks(options.tiny, llm)]
    table = markdown(results)
    print(table)
    if options.output:
        options.output.write_text(table + "\n", encoding="utf-8")
    return int(not all(result.passed for result in results))


if __name__ == "__main__":
    sys.exit(main())
