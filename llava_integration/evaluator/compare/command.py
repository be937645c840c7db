"""``llm2clip compare``: is the new model better? With ``--plan``: how many images, or trainings, a
difference needs."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llava_integration.evaluator.compare.blind import BlindLogs
from llava_integration.evaluator.compare.comparison import Comparison, build
from llava_integration.evaluator.compare.drift import drift
from llava_integration.evaluator.compare.drift_text import drift_text
from llava_integration.evaluator.compare.page import page
from llava_integration.evaluator.compare.pairing import MIN_OVERLAP
from llava_integration.evaluator.compare.planning import PLAN, plan, plan_rows
from llava_integration.evaluator.compare.readers import Choices
from llava_integration.evaluator.compare.report import (
    plain_sentence,
    table,
    text,
)
from llava_integration.evaluator.compare.sides import (
    Side,
    load_models,
    load_side,
    load_sides,
)
from llava_integration.evaluator.compare.statistics import POWER
from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.options import Command, setting
from llm2clip_plugin.outside import printable_lines

WORSE_STATUS = 4  # exit status of --fail-on worse
# what an option needs that is of a comparison alone
COMPARISON = ("not plan", "not drift")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Two or more sides, and how they are compared."""

    base: Path = setting(help="score file, log or folder of the baseline")
    new: tuple[Path, ...] = setting(
        (), help="score files, logs or folders to compare with BASE"
    )
    all_pairs: bool = setting(
        False,
        help="compare every two sides, not each with BASE alone",
        needs=COMPARISON,
    )
    names: tuple[str, ...] = setting(
        (), help="names of the sides in the report, base first"
    )
    output: Path | None = setting(
        None,
        help="folder for compare.json, compare.md and compare.html",
        needs="not plan",
    )
    level: float = setting(
        0.95, help="confidence level of the intervals and verdicts", needs="not drift"
    )
    same_model: bool = setting(
        False,
        help="logs of one benchmark with several model names are runs (seeds) of one model",
    )
    paired_runs: bool = setting(
        False,
        help="pair runs (seeds) of equal number: what varies is the difference of each pair",
        needs=COMPARISON,
    )
    drift: bool = setting(
        False,
        help="instead of a comparison: where BASE and NEW, two runs of one model, differ, say "
        "whether the prompt, the answer or the scoring changed",
        needs="not plan",
    )
    min_overlap: float = setting(
        MIN_OVERLAP,
        help="fraction of a benchmark's items that both sides must have; others are left out",
        needs="not drift",
    )
    fail_on: Literal["nothing", "worse"] = setting(
        "nothing",
        help="worse: exit with status 4 if a new side is worse on some benchmark",
        needs=COMPARISON,
    )
    group: str = setting(
        "",
        help="field of the logs: items with the same value form one cluster, as the questions of "
        "an image do",
    )
    metric: str = setting(
        "", help="metric of a log, or column of a table; none: the first"
    )
    filter: str = setting("", help="filter of the harness; none: the first")
    scorer: str = setting("", help="scorer of inspect_ai; none: the headline's")
    blind: tuple[Path, ...] = setting(
        (),
        help="logs of the same questions answered without the pictures (bench-mllm --blind), one "
        "of another model or one of each side: splits each difference into questions that are "
        "solved blind and those that need eyes",
        needs=COMPARISON,
    )
    blind_chance: float | None = setting(
        None,
        help="with --blind: probability of guessing a question right whose options the logs do not "
        "have; none: 0 for free text, and logs whose right answers are letters are not split",
        needs="blind",
    )
    references: bool = setting(
        True, help="show the published numbers", needs=COMPARISON
    )
    image_folder: Path | None = setting(
        None,
        help="folder of the page's pictures: LLaVA's playground/data/eval, or one benchmark's "
        "folder; none: the data that the answers were scored with",
        needs=COMPARISON,
    )
    questions: int = setting(
        80,
        help="questions per benchmark in the page's browser, wins and losses evenly",
        needs=COMPARISON,
    )
    plan: bool = setting(
        False,
        help="before running anything: print how many images and runs (seeds) --effect needs, from "
        "the noise of pilot scores: BASE alone, or BASE and NEW",
    )
    effect: float = setting(
        1.0,
        help="with --plan: the difference to detect, in the benchmark's unit",
        needs="plan",
    )
    runs: tuple[int, ...] = setting(
        (1, 3, 5),
        help="with --plan: numbers of runs a side",
        needs="plan",
    )
    spread: float | None = setting(
        None,
        help="with --plan: standard deviation over trainings; none: that of BASE's runs",
        needs="plan",
    )

    def __post_init__(self) -> None:
        self._check("level", 0.5 <= self.level < 1, "a number in [0.5, 1)")
        self._check("min-overlap", 0 <= self.min_overlap <= 1, "a number in [0, 1]")
        self._check("effect", self.effect > 0, "a number above 0")
        self._check("runs", min(self.runs, default=0) > 0, "whole numbers above 0")
        if self.blind_chance is not None:
            fits = 0 <= self.blind_chance < 1
            self._check("blind-chance", fits, "a number in [0, 1)")
        if self.output is not None:
            self._check("output", not self.output.is_file(), "a folder")
        if self.image_folder is not None:
            self._check("image-folder", self.image_folder.is_dir(), "a folder")

    def _check(self, option: str, fits: bool, expected: str) -> None:
        """Raises ValueError with an option's value if that does not fit."""
        if fits:
            return
        value = getattr(self, option.replace("-", "_"))
        if isinstance(value, tuple):
            value = " ".join(map(str, value))
        raise ValueError(f"--{option} {value} is invalid; expected {expected}")


COMMAND = Command(
    name="compare",
    example="llm2clip compare runs/openai/scores runs/llm2clip/scores --output report",
    about="Is the new model better? Paired statistics over score files, or over the logs of "
    "lmms-eval, lm-evaluation-harness (--log_samples), VLMEvalKit, inspect_ai, HELM, lighteval, "
    "OpenCompass and EvalScope, or tables (CSV, TSV, JSONL, JSON, Excel) of item, score and group. "
    "Several files of one benchmark in a folder are its runs (seeds).",
    settings=CompareConfig,
    arguments="base new",
    everyday="names all-pairs output level metric group fail-on image-folder blind drift "
    "paired-runs plan effect",
)


def main(argv: list[str] | None = None) -> int:
    """Compare score files and write the reports."""
    args = COMMAND.parse(sys.argv[1:] if argv is None else argv)
    sides = sides_of(args)
    check_names(sides)
    if args.plan:
        print_plan(sides, args)
        return 0
    if args.drift:
        print_drift(sides, args)
        return 0
    comparison = build(
        sides,
        level=args.level,
        references=args.references,
        all_pairs=args.all_pairs,
        min_overlap=args.min_overlap,
        pair_runs=args.paired_runs,
        blind=blind_logs(args),
    )
    if args.output:  # before printing, which `| head` may end
        write_reports(comparison, sides, args)
    print(printable_lines(text(comparison)))  # names in it come from score files
    is_worse = any(row.verdict == "worse" for row in comparison.rows)
    if is_worse and args.fail_on == "worse":
        return WORSE_STATUS
    return 0


def write_reports(
    comparison: Comparison, sides: Sequence[Side], args: CompareConfig
) -> None:
    """Write compare.json, compare.md and compare.html to --output."""
    assert args.output is not None
    as_json = json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False)
    as_page = page(
        comparison, sides, images=args.image_folder, questions=args.questions
    )
    reports = {
        "json": f"{as_json}\n",
        "md": f"# Comparison\n\n{text(comparison)}",
        "html": as_page,
    }
    for ending, report in reports.items():
        path = write_text(args.output / f"compare.{ending}", encodable(report))
        print(f"wrote {path}", file=sys.stderr)


def encodable(report: str) -> str:
    """A report without lone surrogates, which UTF-8 cannot hold: names of files that are not UTF-8,
    and texts of damaged logs, may have them."""
    return report.encode("utf-8", "backslashreplace").decode("utf-8")


def sides_of(args: CompareConfig) -> list[Side]:
    """The sides that are named, or, of BASE alone, one for each of its models. Raises ValueError if
    there is but one."""
    choices = choices_of(args)
    if args.new or args.plan:
        return load_sides(
            [args.base, *args.new],
            args.names,
            same_model=args.same_model,
            choices=choices,
        )
    sides = load_models(args.base, choices)
    if len(sides) < 2:
        raise ValueError(
            "compare needs a second side: BASE NEW, or a BASE with several models (a table with "
            "the column model); with one model, --plan says what a comparison needs"
        )
    if args.names and len(args.names) != len(sides):
        models = ", ".join(side.name for side in sides)
        raise ValueError(f"{len(args.names)} --names for {len(sides)} models: {models}")
    if args.names:
        return [
            replace(side, name=name)
            for side, name in zip(sides, args.names, strict=True)
        ]
    return sides


def check_names(sides: Sequence[Side]) -> None:
    """Raises ValueError for two sides of one name, whose letters and scores would be one's."""
    names = [side.name for side in sides]
    if len(set(names)) < len(names):
        raise ValueError(
            f"sides have the same name ({', '.join(names)}); give each its own with --names"
        )


def print_drift(sides: Sequence[Side], args: CompareConfig) -> None:
    """Print what changed between two runs of one model; with --output, write drift.md and
    drift.json, too."""
    if len(sides) != 2:
        raise ValueError(f"--drift takes two sides, BASE and NEW; got {len(sides)}")
    drifts, notes = drift(*sides)
    names = [side.name for side in sides]
    report = drift_text(drifts, names, notes)
    if args.output:
        as_dict = {
            "names": names,
            "benchmarks": [result.to_dict() for result in drifts],
            "notes": notes,
        }
        as_json = json.dumps(as_dict, indent=2, ensure_ascii=False)
        for ending, content in (("json", f"{as_json}\n"), ("md", report)):
            path = write_text(args.output / f"drift.{ending}", encodable(content))
            print(f"wrote {path}", file=sys.stderr)
    print(printable_lines(report))


def choices_of(args: CompareConfig) -> Choices:
    """What is read of logs that have several of it."""
    return Choices(
        group=args.group, metric=args.metric, filter=args.filter, scorer=args.scorer
    )


def blind_logs(args: CompareConfig) -> BlindLogs | None:
    """The logs of --blind; None without."""
    if not args.blind:
        return None
    logs = []
    for path in args.blind:
        logs.append(
            load_side(path, same_model=True, choices=choices_of(args), blind=True)
        )
    return BlindLogs(logs=tuple(logs), chance=args.blind_chance)


def print_plan(sides: Sequence[Side], args: CompareConfig) -> None:
    """Print how many images and runs a difference needs."""
    noises, notes = plan(sides, spread=args.spread, min_overlap=args.min_overlap)
    rows = plan_rows(noises, effect=args.effect, runs=args.runs, level=args.level)
    lines = table(PLAN, rows)
    test = f"with {POWER:.0%} power, two-sided at {1 - args.level:.0%}"
    print(f"A difference of {args.effect:g} {test}:\n")
    print(printable_lines("\n".join(lines)))
    if any(noise.spread is None for noise in noises):
        print(
            "\nVariation over trainings is unknown: score several runs a side, or set --spread"
        )
    if notes:
        listed = "\n".join(f"- {plain_sentence(note)}" for note in notes)
        print(f"\n{printable_lines(listed)}")


if __name__ == "__main__":
    sys.exit(main())
