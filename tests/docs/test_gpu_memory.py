"""The tables of docs/gpu-memory.md are what scripts/gpu_settings.py computes: one tower is computed again."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from llm2clip_plugin.train.memory import StepMemory

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("gpu_settings", ROOT / "scripts" / "gpu_settings.py")
gpu_settings = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu_settings)

PAGE = (ROOT / "docs" / "gpu-memory.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("no_network")


def test_a_tower_is_as_printed():
    for line in gpu_settings.tower_row("openai_b16"):
        assert line in PAGE.splitlines()


def test_every_tower_llm_and_number_of_gpus_is_there():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) == len(gpu_settings.GPUS) * (len(gpu_settings.TOWERS) + 4 * len(gpu_settings.LLMS))
    assert all(
        any(line.startswith(f"| `{name}`") for line in rows) for name in (*gpu_settings.TOWERS, *gpu_settings.LLMS)
    )


def memory(pair_bytes: float) -> StepMemory:
    return StepMemory(
        precision="bf16",
        trained=10**9,
        frozen_bytes=0.0,
        parameters=10**9,
        pair_bytes=pair_bytes,
        width=1,
        state_bytes=8,
    )


def test_the_least_computation_that_fits_is_chosen():
    """By hand: 1 G parameters under ZeRO-1 on one GPU are 4 G of weights and gradients, 12 of AdamW, 2 of buckets."""
    sizes = {False: memory(100e6), True: memory(10e6)}
    roomy = gpu_settings.best_setting(sizes, world=1, global_batch=64, gpu_gib=80)
    assert str(roomy) == "64, off, 1 (23; 3)"  # 18 + 64 x 100 MB = 24.4 GB
    tight = gpu_settings.best_setting(sizes, world=1, global_batch=64, gpu_gib=22)
    assert str(tight) == "64, on, 1 (17; 4)"  # the whole batch does not fit without checkpointing
    assert gpu_settings.best_setting({False: memory(100e9)}, world=1, global_batch=64, gpu_gib=80) is None
