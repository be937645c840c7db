"""Time of `import llm2clip_plugin` and `llm2clip --help` as processes, and whether they import torch.

    python scripts/bench_import.py [--runs 20] [--json OUT]

Wall time of a new process from start to exit, Python's start-up included. Exit status 1 if the median exceeds the
limit (0.3 s) or a heavy module is imported.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 0.3  # seconds
HEAVY = ("torch", "transformers", "deepspeed", "numpy")
COMMANDS = {
    "python -c pass (floor)": ["-c", "pass"],
    "import llm2clip_plugin": ["-c", "import llm2clip_plugin"],
    "llm2clip --help": ["-m", "llm2clip_plugin.cli", "--help"],
}


def seconds(arguments: list[str], runs: int) -> list[float]:
    """Wall time of each of ``runs`` processes."""
    durations = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        durations.append(time.perf_counter() - start)
    return durations


def heavy_imports(arguments: list[str]) -> list[str]:
    """The modules of HEAVY that a process imports, by ``-X importtime``."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    return [name for name in HEAVY if name in imported]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20, help="processes per command")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    rows, good = {}, True
    for name, arguments in COMMANDS.items():
        durations, heavy = seconds(arguments, options.runs), heavy_imports(arguments)
        rows[name] = {"median_s": statistics.median(durations), "max_s": max(durations), "heavy_imports": heavy}
        good &= rows[name]["median_s"] < LIMIT and not heavy
        print(
            f"{name:26} median {rows[name]['median_s']:.3f} s, slowest {max(durations):.3f} s, heavy: {heavy or 'none'}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print("ok" if good else f"failed: over the limit of {LIMIT} s, or a heavy import")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
