"""MMBench-CN dev: the same questions in Chinese, scored as MMBench is."""

from __future__ import annotations

from pathlib import Path

from llava_integration.benchmarks.base import Benchmark, Item
from llava_integration.benchmarks.rules import mmbench

PATTERNS = ("mmbench_dev_cn*.tsv", "mmbench_test_cn*.tsv", "mmbench_cn*.tsv")


def image_bytes(folder: Path, item: Item) -> bytes | None:
    """The picture of a group, out of the Chinese table."""
    return mmbench.image_bytes(folder, item, PATTERNS)


BENCHMARK = Benchmark(
    name="mmbench_cn",
    title="MMBench-CN",
    headline="vlmevalkit_exact_matching.overall",
    scale=100.0,
    folders=("mmbench", "mmbench_cn"),  # LLaVA keeps both languages in one folder
    questions=PATTERNS,
    tasks=("mmbench_cn_dev", "mmbench_cn_dev_static", "mmbench_cn_dev_lite", "mmbench_cn"),
    annotations=PATTERNS,
    load=mmbench.loader("mmbench_cn", PATTERNS),
    score=mmbench.scorer("mmbench_cn", PATTERNS),
    statistic=mmbench.statistic,
    submission=mmbench.submitter(PATTERNS),
    image_bytes=image_bytes,
)
