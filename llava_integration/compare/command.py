"""``llm2clip compare``: is the new model better? Paired statistics over score files and logs, and a report."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from llava_integration.compare.comparison import build
from llava_integration.compare.planning import lines, plan
from llava_integration.compare.report import page, text
from llava_integration.compare.sides import load_sides
from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.files import printable_lines
from llm2clip_plugin.options import Command


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Two or more sides, and how they are compared."""

    base: Path  # score file, log or folder of the baseline
    new: tuple[Path, ...] = ()  # score files, logs or folders to compare with BASE
    all_pairs: bool = False  # compare every two sides, not each with BASE alone
    names: tuple[str, ...] = ()  # names of the sides in the report, base first
    output: Path | None = None  # folder for compare.json, compare.md and compare.html
    resamples: int = 10_000  # resamples of the bootstrap and of the permutation test
    level: float = 0.95  # confidence level of the intervals
    seed: int = 0  # of the resampling
    references: bool = True  # show the published numbers
    # folder of the page's pictures: LLaVA's playground/data/eval, or one benchmark's folder; none: the data that the
    # answers were scored with
    image_folder: Path | None = None
    images: bool = True  # show pictures in the page
    questions: int = 80  # questions per benchmark in the page's browser, wins and losses evenly
    # before running anything: print how many images and runs (seeds) --effect needs, from the noise of pilot scores:
    # BASE alone, or BASE and NEW
    plan: bool = False
    effect: float = 1.0  # with --plan: the difference to detect, in the benchmark's unit
    runs: tuple[int, ...] = (1, 3, 5)  # with --plan: numbers of runs a side
    spread: float | None = None  # with --plan: standard deviation over trainings; none: that of BASE's runs
    power: float = 0.8  # with --plan: probability of detecting the difference
    correlation: float = 0.5  # with --plan: of the two sides' scores over images, where BASE is alone

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("resamples", self.resamples >= 100, "at least 100, better 10000"),
            ("level", 0.5 <= self.level < 1, "a number in [0.5, 1)"),
            ("effect", self.effect > 0, "a number above 0"),
            ("runs", min(self.runs, default=0) > 0, "whole numbers above 0"),
            ("spread", self.spread is None or self.spread >= 0, "0 or more"),
            ("power", 0.5 <= self.power < 1, "a number in [0.5, 1)"),
            ("correlation", -1 <= self.correlation < 1, "a number in [-1, 1)"),
        ):
            if not fits:
                raise ValueError(f"--{name} {getattr(self, name)} does not fit; expected {expected}")
        if self.output and self.output.is_file():
            raise ValueError(f"--output {self.output} is a file; expected a folder")
        if not self.new and not self.plan:
            raise ValueError("compare needs a second side: BASE NEW; with BASE alone, --plan says what one needs")


COMMAND = Command(
    name="compare",
    example="llm2clip compare runs/openai/scores runs/llm2clip/scores --output report",
    about="Is the new model better? Paired statistics over score files, or over the logs of lmms-eval, "
    "lm-evaluation-harness (--log_samples), VLMEvalKit and inspect_ai, or tables (CSV, JSONL) of item, score and "
    "group. Several files of one benchmark in a folder are its runs (seeds).",
    settings=CompareConfig,
    arguments="base new",
    everyday="names all-pairs output resamples references image-folder images plan effect",
    shown={"images": "images"},
    needs={
        "output": "not plan",
        **dict.fromkeys(("effect", "runs", "spread", "power", "correlation"), "plan"),
    },
)


def main(argv: list[str] | None = None) -> int:
    """Compare score files and write the reports."""
    args = COMMAND.parse(sys.argv[1:] if argv is None else argv)
    sides = load_sides([args.base, *args.new], args.names)
    if args.plan:
        drawn = {"resamples": min(args.resamples, 1000), "seed": args.seed}
        noises = plan(sides, spread=args.spread, correlation=args.correlation, **drawn)
        told = lines(noises, effect=args.effect, runs=args.runs, level=args.level, power=args.power)
        print(printable_lines("\n".join(told)))
        return 0
    chosen = {name: getattr(args, name) for name in ("resamples", "level", "seed", "references", "all_pairs")}
    comparison = build(sides, **chosen)
    if args.output:  # before printing, which `| head` may end
        pictures = {"images": args.image_folder, "with_images": args.images}
        reports = {
            "json": json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False) + "\n",
            "md": text(comparison, markdown=True),
            "html": page(comparison, sides, **pictures, questions=args.questions),
        }
        for ending, report in reports.items():
            with atomic_file(args.output / f"compare.{ending}") as temporary:
                temporary.write_text(report, encoding="utf-8")
            print(f"wrote {args.output}/compare.{ending}", file=sys.stderr)
    print(printable_lines(text(comparison)))  # names in it come from score files
    return 0


if __name__ == "__main__":
    sys.exit(main())
