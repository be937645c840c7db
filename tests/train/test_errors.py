"""Ranks without a launcher are refused."""

from __future__ import annotations

import pytest

from llm2clip_plugin.train.distributed import set_single_process_environment


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("SLURM_NTASKS", "16")  # of the whole job, also in the batch script
    set_single_process_environment()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, "16")
    with pytest.raises(ValueError, match=variable):
        set_single_process_environment()
