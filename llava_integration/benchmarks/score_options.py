"""The options of ``llm2clip score``."""

from dataclasses import dataclass
from pathlib import Path

from llava_integration.benchmarks.rules import benchmark_names
from llm2clip_plugin.options.command import Command


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """An answers file to score."""

    benchmark: str
    data: Path  # LLaVA's evaluation folder of the benchmark, or a .jsonl with own questions
    answers: Path  # of LLaVA's scripts, a submission file, or lmms-eval --log_samples (file or folder)
    output: Path | None = None  # score file to write
    submission: Path | None = None  # file to write for the benchmark's server
    reviews: Path | None = None  # the judge's file, of a benchmark that has a judge
    model: str = ""  # the model's name in reports; "": from the answers file
    corrected: bool = False  # also score without the official script's quirks
    # largest fraction of missing, duplicate, unreadable or unknown answers; without a value: 1.0
    allow_missing: float = 0.10

    def __post_init__(self) -> None:
        if not 0 <= self.allow_missing <= 1:
            raise ValueError(f"--allow-missing {self.allow_missing} must be a fraction between 0 and 1")


COMMAND = Command(
    name="score",
    example="llm2clip score textvqa playground/data/eval/textvqa --answers answers.jsonl --output textvqa.scores.json",
    about="Score one answers file against a benchmark's annotations, by the official rule. BENCHMARK is one of "
    f"{', '.join(benchmark_names())}.",
    settings=ScoreConfig,
    arguments="benchmark data",
    also={"json": "output"},
    alone={"allow_missing": "1"},
)
