"""The options of ``llm2clip score``."""

from pathlib import Path

from llava_integration.benchmarks.rules import benchmark_names
from llm2clip_plugin.options.parser import Parser, add_data


def parser() -> Parser:
    """The command line."""
    parse = Parser(
        "score",
        "llm2clip score textvqa playground/data/eval/textvqa --answers answers.jsonl --output textvqa.scores.json",
        "Score one answers file against a benchmark's annotations, by the official rule.",
        also={"json": "output"},
    )
    parse.add_argument("benchmark", metavar="BENCHMARK", help=", ".join(benchmark_names()))
    add_data(parse, "LLaVA's evaluation folder of the benchmark, or a .jsonl with own questions", type=Path)
    parse.add_argument(
        "--answers",
        required=True,
        type=Path,
        help="answers of LLaVA's scripts, a submission file, or lmms-eval --log_samples (file or folder)",
    )
    parse.add_argument("--output", type=Path, help="score file to write")
    parse.add_argument("--submission", type=Path, help="file to write for the benchmark's server")
    parse.add_argument("--reviews", type=Path, help="the judge's file, of a benchmark that has a judge")
    parse.add_argument("--model", default="", help="the model's name in reports (default: from the answers file)")
    parse.add_argument(
        "--allow-missing",
        dest="allow",
        nargs="?",
        const=1.0,
        default=0.10,
        type=float,
        metavar="FRACTION",
        help="largest fraction of missing, duplicate, unreadable or unknown answers (default: 0.10; "
        "without a value: 1.0)",
    )
    return parse
