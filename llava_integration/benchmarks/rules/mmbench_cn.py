"""MMBench-CN dev: the same questions in Chinese, scored by the same rule."""

from dataclasses import replace

from llava_integration.benchmarks.benchmark import published_scores
from llava_integration.benchmarks.rules import mmbench

PATTERNS = ("mmbench_dev_cn*.tsv", "mmbench_test_cn*.tsv", "mmbench_cn*.tsv")
BENCHMARK = replace(
    mmbench.BENCHMARK,
    name="mmbench_cn",
    title="MMBench-CN",
    order=9,
    folders=("mmbench", "mmbench_cn"),  # LLaVA keeps both languages in one folder
    annotations=PATTERNS,
    question_files=PATTERNS,
    evaluate_options=(*mmbench.BENCHMARK.evaluate_options, "--lang", "cn"),
    published=published_scores(llava_7b=58.3, llava_13b=63.6, reproduced_7b=60.39, llm2clip_7b=60.40),
)
