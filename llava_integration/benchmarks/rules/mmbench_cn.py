"""MMBench-CN dev: the same questions in Chinese, scored by the same rule."""

from __future__ import annotations

from dataclasses import replace

from llava_integration.benchmarks.benchmark import LLAVA_7B, LLAVA_7B_REPRODUCED, LLAVA_13B, LLM2CLIP_7B
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
    lmms_eval_tasks=("mmbench_cn_dev", "mmbench_cn_dev_static", "mmbench_cn_dev_lite", "mmbench_cn"),
    published={LLAVA_7B: 58.3, LLAVA_13B: 63.6, LLAVA_7B_REPRODUCED: 60.39, LLM2CLIP_7B: 60.40},
)
