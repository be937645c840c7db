"""Processes forked from one that has imported torch, DeepSpeed and this package: a rank starts without imports."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["deepspeed", "llm2clip_plugin.stages.tower.command", "llm2clip_plugin.stages.tower.run"])


class Script:
    """A Python script as a process of its own, with the surface of ``subprocess.Popen``; its output is dropped."""

    def __init__(self, script: Path, argv: list[str], environment: dict[str, str], folder: Path) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
        self._process = FORKED.Process(target=_run, args=(script, argv, environment, folder))
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        return self._process.exitcode


def _run(script: Path, argv: list[str], environment: dict[str, str], folder: Path) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(1)
    sys.argv = [str(script), *argv]
    runpy.run_path(str(script), run_name="__main__")
