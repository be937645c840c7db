"""``llm2clip compare``: is the new tower better? Paired statistics over score files, and a report."""

import argparse
import json
import sys
from pathlib import Path

from llava_integration.compare import report as tables
from llava_integration.compare.comparison import Comparison, Side, load_sides
from llava_integration.compare.page import PageOptions, page
from llava_integration.compare.planning import lines, plan
from llava_integration.compare.report import build
from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.files import printable_lines
from llm2clip_plugin.options import Parser

# The options of ``llm2clip compare``.


def parser() -> Parser:
    """The command line."""
    made = Parser(
        "compare",
        "llm2clip compare runs/openai/scores runs/llm2clip/scores --output report",
        "Is the new tower better? Paired statistics over score files, and a report. Several files of one\n"
        "benchmark in a folder are its runs (seeds).",
        rare=(
            "json",
            "markdown",
            "html",
            "level",
            "seed",
            "questions",
            "runs",
            "spread",
            "power",
            "correlation",
        ),
    )
    made.add_argument("base", metavar="BASE", type=Path, help="score file or folder of the baseline")
    made.add_argument("new", metavar="NEW", type=Path, nargs="*", help="score files or folders to compare with BASE")
    made.add_argument("--names", nargs="+", default=[], help="names of the sides in the report, base first")
    made.add_argument("--output", type=Path, help="folder for compare.json, compare.md and compare.html")
    made.add_argument("--json", type=Path, help="write only this file")
    made.add_argument("--markdown", type=Path, help="write only this file")
    made.add_argument("--html", type=Path, help="write only this file")
    made.add_argument(
        "--resamples", type=int, default=10_000, help="resamples of the bootstrap and of the permutation test"
    )
    made.add_argument("--level", type=float, default=0.95, help="confidence level of the intervals")
    made.add_argument("--seed", type=int, default=0, help="seed of the resampling")
    made.add_argument("--no-references", action="store_true", help="omit the published numbers")
    made.add_argument(
        "--image-folder", type=Path, help="folder of the page's pictures: LLaVA's playground/data/eval, or "
        "one benchmark's folder (default: the --data that the answers were scored with)"
    )  # fmt: skip
    made.add_argument("--no-images", action="store_true", help="omit the pictures from the page")
    made.add_argument(
        "--questions",
        type=int,
        default=80,
        help="questions per benchmark in the page's browser, wins and losses evenly",
    )
    planning = made.add_argument_group("before running anything")
    planning.add_argument(
        "--plan", action="store_true", help="print how many images and runs (seeds) --effect needs, from the noise "
        "of pilot scores: BASE alone, or BASE and NEW"
    )  # fmt: skip
    planning.add_argument("--effect", type=float, default=1.0, help="the difference to detect, in the benchmark's unit")
    planning.add_argument("--runs", type=int, nargs="+", default=[1, 3, 5], help="numbers of runs a side to plan for")
    planning.add_argument(
        "--spread", type=float, help="standard deviation over trainings (default: that of BASE's runs)"
    )
    planning.add_argument("--power", type=float, default=0.8, help="probability of detecting the difference")
    planning.add_argument(
        "--correlation", type=float, default=0.5, help="of the two sides' scores over images, where BASE is alone"
    )
    return made


def outputs(args: argparse.Namespace) -> dict[str, Path]:
    """Which files to write."""
    endings = {"json": "json", "markdown": "md", "html": "html"}
    below = {kind: args.output / f"compare.{ending}" if args.output else None for kind, ending in endings.items()}
    return {kind: path for kind in endings if (path := getattr(args, kind) or below[kind])}


def write(comparison: Comparison, sides: list[Side], files: dict[str, Path], options: PageOptions) -> None:
    """Write the chosen reports."""
    for kind, path in files.items():
        if kind == "json":
            text = json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False) + "\n"
        elif kind == "markdown":
            text = tables.markdown(comparison)
        else:
            text = page(comparison, sides, options)
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)


def planned(sides: list[Side], args: argparse.Namespace) -> list[str]:
    """The lines of --plan. Raises ValueError for numbers out of range."""
    for name, value, fits, expected in (
        ("effect", args.effect, args.effect > 0, "a number above 0"),
        ("runs", min(args.runs), min(args.runs) > 0, "whole numbers above 0"),
        ("spread", args.spread, args.spread is None or args.spread >= 0, "0 or more"),
        ("power", args.power, 0.5 <= args.power < 1, "a number in [0.5, 1)"),
        ("correlation", args.correlation, -1 <= args.correlation < 1, "a number in [-1, 1)"),
    ):
        if not fits:
            raise ValueError(f"--{name} {value} does not fit; expected {expected}")
    noises = plan(
        sides, spread=args.spread, correlation=args.correlation, resamples=min(args.resamples, 1000), seed=args.seed
    )
    return lines(noises, effect=args.effect, runs=args.runs, level=args.level, power=args.power)


def main(argv: list[str] | None = None) -> int:
    """Compare score files and write the reports."""
    args = parser().parse_args(argv)
    if args.resamples < 100:
        raise ValueError(f"--resamples {args.resamples} is too few for an interval; use at least 100, better 10000")
    if not 0.5 <= args.level < 1:
        raise ValueError(f"--level {args.level} is not in [0.5, 1); use 0.95, for example")
    if not args.new and not args.plan:
        raise ValueError("compare needs a second side: BASE NEW; with BASE alone, --plan says what a difference needs")
    sides = load_sides([args.base, *args.new], args.names)
    if args.plan:
        print(printable_lines("\n".join(planned(sides, args))))
        return 0
    comparison = build(
        sides, resamples=args.resamples, level=args.level, seed=args.seed, references=not args.no_references
    )
    options = PageOptions(images=args.image_folder, with_images=not args.no_images, questions=args.questions)
    write(comparison, sides, outputs(args), options)  # before printing, which `| head` may end
    print(printable_lines(tables.terminal(comparison)))  # names in it come from score files
    return 0


if __name__ == "__main__":
    sys.exit(main())
