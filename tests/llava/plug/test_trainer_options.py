"""LLaVA's names of the trainer's options, as transformers 5 reads them."""

import math
from types import SimpleNamespace

import pytest

from llava_integration.plug.compat.patches import translate

pytestmark = pytest.mark.both_stacks


def translated(monkeypatch, local_rank=None, **options):
    """The options after translation; ``local_rank``: what the launcher sets, as it does for the
    program too."""
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    if local_rank is None:
        monkeypatch.delenv("LOCAL_RANK")
    given = {
        "warmup_ratio": None,
        "warmup_steps": 0,
        "evaluation_strategy": None,
        "eval_strategy": "no",
    }
    made = SimpleNamespace(**{**given, "local_rank": -1, **options})
    translate(made)
    return made


@pytest.mark.parametrize(
    "ratio, steps", [(0.0, 1000), (0.03, 1000), (0.03, 7), (0.5, 3), (1.0, 1000)]
)
def test_the_warm_up_is_as_long_as_in_4_37(monkeypatch, ratio, steps):
    warm_up = translated(monkeypatch, warmup_ratio=ratio).warmup_steps
    as_5_reads_it = int(warm_up) if warm_up >= 1 else math.ceil(steps * warm_up)
    assert as_5_reads_it == math.ceil(steps * ratio)


def test_the_rest_is_as_4_37_sets_it(monkeypatch):
    assert (
        translated(monkeypatch, warmup_ratio=0.03, warmup_steps=20).warmup_steps == 20
    )
    made = translated(monkeypatch, evaluation_strategy="steps")
    assert made.eval_strategy == "steps"
    assert made.local_rank == 0
    # torchrun passes no --local_rank
    assert translated(monkeypatch, local_rank=3).local_rank == 3
    assert translated(monkeypatch).eval_strategy == "no"
