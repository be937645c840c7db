import dataclasses
from pathlib import Path

import pytest

from llm2clip_plugin.data import PREFETCH_MB, free_shared_memory, lacks_shared_memory, plan_loading, row_bytes

L14_336 = row_bytes(336, 4096)  # a row of openai_l14_336 against Llama 3's embeddings


@pytest.mark.parametrize("rows", [1, 16, 512, 4096])
@pytest.mark.parametrize("micro_batch", [1, 16, 512])
@pytest.mark.parametrize("workers", [1, 8, 32])
def test_what_is_prepared_ahead_is_bounded(rows: int, micro_batch: int, workers: int) -> None:
    micro_batch = min(rows, micro_batch)
    plan = plan_loading(rows=rows, micro_batch=micro_batch, workers=workers, row_bytes=L14_336, prefetch_mb=PREFETCH_MB)
    assert 1 <= plan.part <= micro_batch and plan.prefetch >= 1
    assert plan.shared_bytes <= PREFETCH_MB * 1e6
    more_than_enough = plan.part * plan.workers * max(2, 1 + 2 * rows // (plan.part * workers))
    assert plan.part * plan.workers * plan.prefetch <= more_than_enough


def test_too_little_shared_memory_is_told(tmp_path: Path) -> None:
    plan = plan_loading(rows=512, micro_batch=512, workers=8, row_bytes=L14_336, prefetch_mb=PREFETCH_MB)
    free = free_shared_memory(str(tmp_path))
    assert free is not None
    fits, too_many = 1, free // plan.shared_bytes + 2
    assert not lacks_shared_memory([plan], fits, str(tmp_path))
    assert f"need {too_many * plan.shared_bytes:,}" in lacks_shared_memory([plan], too_many, str(tmp_path))
    none = dataclasses.replace(plan, workers=0)
    assert not lacks_shared_memory([none], too_many, str(tmp_path))
    assert not lacks_shared_memory([plan], too_many, str(tmp_path / "absent"))  # not Linux: nothing to compare with
