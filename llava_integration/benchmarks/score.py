"""``llm2clip score``: score one answers file against a benchmark's annotations, by the official rule."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from llava_integration.answer.questions import settings_file
from llava_integration.benchmarks.answers import Answers, read_answers
from llava_integration.benchmarks.benchmark import ALLOWED, Benchmark
from llava_integration.benchmarks.rules import benchmark, benchmarks
from llava_integration.compat.runner import installed_version
from llm2clip_plugin.contracts import ScoreFile, sha256_file
from llm2clip_plugin.files import printable_lines, read_json_value
from llm2clip_plugin.options import Command

LIBRARIES = ("llm2clip-plugin", "llava-torch", "llava", "torch", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """An answers file to score."""

    benchmark: str  # one of these names
    data: Path  # LLaVA's evaluation folder of the benchmark, or a .jsonl with own questions
    answers: Path  # of LLaVA's scripts, a folder of its chunks, or a submission file
    output: Path | None = None  # score file to write
    submission: Path | None = None  # file to write for the benchmark's server
    reviews: Path | None = None  # the judge's file, of a benchmark that has a judge
    model: str = ""  # the model's name in reports; "": from the answers file
    # largest fraction of missing, duplicate, unreadable or unknown answers; without a value: 1.0
    allow_missing: float = ALLOWED

    def __post_init__(self) -> None:
        if not 0 <= self.allow_missing <= 1:
            raise ValueError(f"--allow-missing {self.allow_missing} must be a fraction between 0 and 1")


COMMAND = Command(
    name="score",
    example="llm2clip score textvqa playground/data/eval/textvqa --answers answers.jsonl --output textvqa.scores.json",
    about="Score one answers file against a benchmark's annotations, by the official rule. BENCHMARK is one of "
    f"{', '.join(benchmarks())}.",
    settings=ScoreConfig,
    arguments="benchmark data",
    also={"json": "output"},
    alone={"allow_missing": "1"},
)


def score_answers(
    name: str, data: Path, answers: Answers, *, allow: float = ALLOWED, reviews: Path | None = None, model: str = ""
) -> ScoreFile:
    """Score answers, and record what they were made from. Raises ValueError for answers to another benchmark."""
    member = benchmark(name)
    record = member.score(data, answers, allow=allow, reviews=reviews)
    settings = settings_file(answers.path)
    provenance = {
        **({"answer_settings": read_json_value(settings)} if settings.is_file() else {}),
        "data": str(data.resolve()),
        "data_sha256": member.data_digest(data),
        "answers": str(answers.path),
        "answers_sha256": {str(answers.path): sha256_file(answers.path)} if answers.path.is_file() else {},
        "layout": answers.layout,
        "versions": {name: installed for name in LIBRARIES if (installed := installed_version(name))},
    }
    return replace(record, model=model or record.model, provenance=provenance)


def describe(member: Benchmark, record: ScoreFile) -> str:
    """What the terminal shows: headline, counts above zero, notes, the other metrics."""
    value = record.metrics[member.headline]
    lines = [f"{member.title} of {record.model}: {value * member.scale:.2f} {member.unit}   ({member.headline})"]
    lines.append("  " + ", ".join(f"{name} {count}" for name, count in record.counts.items() if count))
    lines += [f"  note: {note}" for note in record.notes]
    width = max((len(name) for name in record.metrics), default=0)
    lines += [f"  {name:<{width}}  {number:.10g}" for name, number in record.metrics.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Score one answers file."""
    args = COMMAND.parse(sys.argv[1:] if argv is None else argv)
    member = benchmark(args.benchmark)
    answers = read_answers(args.answers)
    if args.submission:
        if not member.submission_format:
            raise ValueError(f"{args.benchmark} has no server to submit to; remove --submission")
        member.write_submission(args.data, answers, args.submission)
        print(f"wrote {args.submission} for the server of {member.title}", file=sys.stderr)
        if not args.output:
            return 0
    record = score_answers(
        args.benchmark, args.data, answers, allow=args.allow_missing, reviews=args.reviews, model=args.model
    )
    if args.output:  # before printing, which `| head` may end
        record.write(args.output)
        print(f"wrote {args.output}", file=sys.stderr)
    print(printable_lines(describe(member, record)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
