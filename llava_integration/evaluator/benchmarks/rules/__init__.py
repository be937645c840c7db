"""One file per benchmark, or per family; each defines ``BENCHMARK``, and a new file is a new
benchmark."""

from llava_integration.evaluator.benchmarks.benchmark import Benchmark
from llm2clip_plugin.discovery import discover
from llm2clip_plugin.options import unknown


def benchmarks() -> dict[str, Benchmark]:
    """Every benchmark by name, in the order of LLaVA's table."""
    members: dict[str, Benchmark] = discover(__name__, "BENCHMARK")
    return dict(
        sorted(members.items(), key=lambda member: (member[1].order, member[0]))
    )


def benchmark(name: str) -> Benchmark:
    """The benchmark with that name. Raises ValueError with the known names for an unknown one."""
    by_name = benchmarks()
    if name not in by_name:
        raise ValueError(unknown("benchmark", name, by_name))
    return by_name[name]
