"""The options of ``llm2clip compare``."""

from pathlib import Path

from llm2clip_plugin.options.parser import Parser


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
