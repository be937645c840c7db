"""The precision that is chosen where none is set, and the warning about one that is slow here."""

import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

from llm2clip_plugin.doctor import check_precision
from llm2clip_plugin.precision import (
    SLOW,
    cpu_speeds,
    fastest_dtype,
    fastest_precision,
    slowness,
)

CPU = torch.device("cpu")
# oneDNN and torch as on a CPU that has AVX2 alone, so no bf16 units
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
PROGRAM = """
import json, sys, torch
from llm2clip_plugin import precision
cpu = torch.device("cpu")
speeds = precision.cpu_speeds(torch.float32, torch.bfloat16)
precision.warn_if_slow(torch.bfloat16, cpu, "--precision", "training")
print(json.dumps([speeds[torch.float32], speeds[torch.bfloat16],
                  precision.fastest_precision(cpu)]))
"""


@pytest.fixture
def measured_anew():
    cpu_speeds.cache_clear()
    yield
    cpu_speeds.cache_clear()


@pytest.mark.parametrize("variables", [{}, AVX2], ids=["this CPU", "AVX2"])
def test_the_faster_precision_is_chosen_and_a_slow_one_gets_one_line(variables):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    fp32, bf16, chosen = json.loads(done.stdout)
    assert chosen == ("bf16" if bf16 > fp32 else "fp32")
    warnings = done.stderr.splitlines()
    if variables and platform.machine() == "x86_64":
        assert chosen == "fp32"
        assert len(warnings) == 1
    if fp32 / bf16 < SLOW:
        assert not warnings
    else:
        assert warnings[0].startswith("warning: bfloat16 makes ")
        assert "training in bfloat16 takes" in warnings[0]
        assert warnings[0].endswith("leave --precision out, or choose float32")


def test_a_measurement_changes_nothing_else(measured_anew):
    """Not the random numbers of a training that sets no precision, nor its threads."""
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    speeds = cpu_speeds(torch.float32, torch.bfloat16)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert cpu_speeds(torch.float32, torch.bfloat16) is speeds
    assert min(speeds.values()) > 0


@pytest.mark.parametrize("slower", [torch.float32, torch.bfloat16])
def test_a_busy_moment_on_a_cpu_chooses_no_other_dtype(
    monkeypatch, measured_anew, slower
):
    """One of the two is four times as slow; while other work runs, the faster one is five times
    slower than that."""
    now = 0.0
    calls: Counter[torch.dtype] = Counter()

    def timed_product(left: torch.Tensor, right: torch.Tensor) -> None:
        nonlocal now
        calls[left.dtype] += 1
        if left.dtype == slower:
            now += 0.004
        elif calls[left.dtype] <= 2:
            now += 0.02
        else:
            now += 0.001

    monkeypatch.setattr(torch, "mm", timed_product)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert fastest_dtype(CPU) is not slower
    line = slowness(torch.bfloat16, CPU, "--precision", "training")
    assert ("4 times" in line) is (slower == torch.bfloat16)
    (finding,) = check_precision()
    assert f"{fastest_precision(CPU)} is used" in finding.value
    # 33.6 MFLOP in 1 ms and in 4 ms
    assert {"34", "8.4"} <= set(finding.value.replace(",", "").split())


def test_float32_and_gpus_are_not_measured(monkeypatch):
    monkeypatch.setattr(torch, "mm", None)
    assert slowness(torch.float32, CPU, "--precision", "training") == ""
    gpu = torch.device("cuda")
    assert slowness(torch.bfloat16, gpu, "--precision", "training") == ""
