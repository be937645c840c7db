"""``llm2clip compare``: is the new tower better? Paired statistics over score files, and a report."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from llava_integration.compare import tables
from llava_integration.compare.build import build
from llava_integration.compare.comparison import Comparison
from llava_integration.compare.options import COMMAND, CompareConfig
from llava_integration.compare.page import PageOptions, page
from llava_integration.compare.planning import lines, plan
from llava_integration.compare.sides import Side, load_sides
from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.outside.values import printable_lines


def outputs(args: CompareConfig) -> dict[str, Path]:
    """Which files to write."""
    chosen = {kind: getattr(args, kind) for kind in ("json", "markdown", "html")}
    if args.output:
        endings = {"json": "json", "markdown": "md", "html": "html"}
        chosen = {kind: path or args.output / f"compare.{endings[kind]}" for kind, path in chosen.items()}
    return {kind: path for kind, path in chosen.items() if path}


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


def planned(sides: list[Side], args: CompareConfig) -> list[str]:
    """The lines of --plan."""
    noises = plan(
        sides, spread=args.spread, correlation=args.correlation, resamples=min(args.resamples, 1000), seed=args.seed
    )
    return lines(noises, effect=args.effect, runs=args.runs, level=args.level, power=args.power)


def main(argv: list[str] | None = None) -> int:
    """Compare score files and write the reports."""
    args = COMMAND.parse(sys.argv[1:] if argv is None else argv)
    sides = load_sides([args.base, *args.new], args.names)
    if args.plan:
        print(printable_lines("\n".join(planned(sides, args))))
        return 0

    def progress(tasks: list) -> Iterable:
        return tqdm(tasks, desc="comparing", unit="benchmark", delay=2)

    comparison = build(
        sides,
        resamples=args.resamples,
        level=args.level,
        seed=args.seed,
        references=args.references,
        progress=progress,
    )
    options = PageOptions(images=args.image_folder, with_images=args.images, questions=args.questions)
    write(comparison, sides, outputs(args), options)  # before printing, which `| head` may end
    print(printable_lines(tables.terminal(comparison)))  # names in it come from score files
    return 0


if __name__ == "__main__":
    sys.exit(main())
