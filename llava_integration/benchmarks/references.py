"""Published numbers to read ours against: reported by others, one run each, never part of a test."""

from __future__ import annotations

# LLaVA's model zoo (https://github.com/haotian-liu/LLaVA/blob/main/docs/MODEL_ZOO.md) and the LLM2CLIP project page
# (https://aka.ms/llm2clip). Percent; MME is perception, of 2000; test splits and servers where the benchmark has them.
REFERENCES: dict[str, dict[str, float]] = {
    "LLaVA-1.5 7B (official)": {
        "vqav2": 78.5,
        "gqa": 62.0,
        "vizwiz": 50.0,
        "scienceqa": 66.8,
        "textvqa": 58.2,
        "pope": 85.9,
        "mme": 1510.7,
        "mmbench": 64.3,
        "mmbench_cn": 58.3,
        "seedbench": 58.6,
        "llava_bench": 65.4,
        "mmvet": 31.1,
    },
    "LLaVA-1.5 13B (official)": {
        "vqav2": 80.0,
        "gqa": 63.3,
        "vizwiz": 53.6,
        "scienceqa": 71.6,
        "textvqa": 61.3,
        "pope": 85.9,
        "mme": 1531.3,
        "mmbench": 67.7,
        "mmbench_cn": 63.6,
        "seedbench": 61.6,
        "llava_bench": 72.5,
        "mmvet": 36.1,
    },
    "LLaVA-1.5 7B (LLM2CLIP's reproduction)": {
        "vqav2": 79.04,
        "gqa": 62.86,
        "vizwiz": 50.57,
        "scienceqa": 67.97,
        "textvqa": 57.48,
        "mme": 1476.69,
        "mmbench": 66.66,
        "mmbench_cn": 60.39,
        "llava_bench": 58.0,
        "mmvet": 34.3,
    },
    "LLaVA-1.5 7B + LLM2CLIP (paper)": {
        "vqav2": 79.80,
        "gqa": 63.15,
        "vizwiz": 52.37,
        "scienceqa": 69.92,
        "textvqa": 58.35,
        "mme": 1505.82,
        "mmbench": 68.29,
        "mmbench_cn": 60.40,
        "llava_bench": 62.7,
        "mmvet": 34.8,
    },
}
NOTE = "reported by others, one run, no interval; VQAv2, VizWiz and MMBench on splits that a server scores"
