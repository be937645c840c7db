"""``llm2clip score``: one answers file against a benchmark's own files, by the official rule."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import numpy as np

from llava_integration.benchmarks.answers import Answers, read_answers
from llava_integration.benchmarks.base import MODULES, Benchmark, Options, benchmark, data_digest
from llm2clip_plugin.contracts import ScoreFile, sha256_file


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        prog="llm2clip score", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parse.add_argument("benchmark", metavar="BENCHMARK", help=", ".join(MODULES))
    parse.add_argument("--data", required=True, type=Path, help="LLaVA's evaluation folder of the benchmark")
    parse.add_argument(
        "--answers",
        required=True,
        type=Path,
        help="answers of LLaVA's scripts, a submission file, or lmms-eval --log_samples (file or folder)",
    )
    parse.add_argument("--json", type=Path, help="where to write the score file")
    parse.add_argument("--submission", type=Path, help="also write the file that the benchmark's server takes")
    parse.add_argument("--reviews", type=Path, help="the judge's file (llava_bench, mmvet)")
    parse.add_argument("--model", default="", help="name of the model in reports; default: as the answers file has it")
    parse.add_argument("--corrected", action="store_true", help="also the rule without the official script's quirks")
    parse.add_argument(
        "--allow-missing",
        "--allow-faults",
        dest="allow",
        nargs="?",
        const=1.0,
        default=0.10,
        type=float,
        metavar="SHARE",
        help="largest share of missing, doubled, broken or foreign answers (default 0.10;\nwithout a number: any)",
    )
    return parse


def score_answers(name: str, data: Path, answers: Answers, options: Options, *, model: str = "") -> ScoreFile:
    """Score answers that were read; the ScoreFile says what it was made from."""
    chosen = benchmark(name)
    scored = chosen.score(data, answers, options)
    notes = list(scored.notes)
    if answers.layout == "lmms_eval":
        notes.append("the answers are lmms-eval's log: its prompts may differ from LLaVA's (TextVQA has no OCR tokens)")
    return ScoreFile(
        benchmark=name,
        metrics=scored.metrics,
        items=scored.items,
        counts=scored.counts,
        model=model or answers.model,
        provenance=provenance(chosen, data, answers),
        notes=notes,
    )


def provenance(chosen: Benchmark, data: Path, answers: Answers) -> dict:
    """Where a score comes from: files with their hashes, layout, versions."""
    files = {str(answers.path): sha256_file(answers.path)} if answers.path.is_file() else {}
    return {
        "data": str(data.resolve()),
        "data_sha256": data_digest(chosen, data),
        "answers": str(answers.path),
        "answers_sha256": files,
        "layout": answers.layout,
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }


def describe(chosen: Benchmark, record: ScoreFile) -> str:
    """What the terminal shows: headline, counts that are not zero, notes, the other metrics."""
    value = record.metrics.get(chosen.headline)
    lines = []
    if value is not None:
        lines.append(
            f"{chosen.title} of {record.model}: {value * chosen.scale:.2f} {chosen.unit}   ({chosen.headline})"
        )
    lines.append("  " + ", ".join(f"{name} {count}" for name, count in record.counts.items() if count))
    lines += [f"  note: {note}" for note in record.notes]
    width = max((len(name) for name in record.metrics), default=0)
    lines += [f"  {name:<{width}}  {number:.10g}" for name, number in record.metrics.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Score one answers file."""
    args = parser().parse_args(argv)
    chosen = benchmark(args.benchmark)
    if not 0 <= args.allow <= 1:
        raise ValueError(f"--allow-missing {args.allow} is not a share; expected 0 to 1")
    if not args.data.is_dir():
        raise FileNotFoundError(f"no folder {args.data}; --data is LLaVA's evaluation folder of {args.benchmark}")
    answers = read_answers(args.answers, tasks=chosen.tasks)
    if args.submission:
        if chosen.submission is None:
            raise ValueError(f"{args.benchmark} has no server to submit to; leave out --submission")
        chosen.submission(args.data, answers, args.submission)
        print(f"wrote {args.submission} for the server of {chosen.title}", file=sys.stderr)
        if not args.json:
            return 0
    options = Options(allow=args.allow, corrected=args.corrected, reviews=args.reviews)
    record = score_answers(args.benchmark, args.data, answers, options, model=args.model)
    if args.json:  # first, so that `| head` doesn't stop it
        record.write(args.json)
        print(f"wrote {args.json}", file=sys.stderr)
    print(describe(chosen, record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
