"""Processes forked from one that has imported torch, DeepSpeed and this package: a start costs no imports."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "deepspeed",
        "peft",
        "llm2clip_plugin.stages.llm.run",
        "llm2clip_plugin.stages.tower.command",
        "llm2clip_plugin.stages.tower.run",
    ]
)
SECONDS = 300  # of a command; then it is killed


class Script:
    """A Python script as a process of its own, with the surface of ``subprocess.Popen``; ``output``: a file for stdout
    and stderr, which are dropped by default."""

    def __init__(
        self, script: Path, argv: list[str], environment: dict[str, str], folder: Path, output: str = os.devnull
    ) -> None:
        self._process = _start(_run, script, argv, environment, folder, output)

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


def run_command(words: list[str], environment: dict[str, str], folder: Path) -> tuple[int | None, str]:
    """``llm2clip WORDS``: exit status and output."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
        process = _start(_command, words, environment, folder, output.name)
        process.join(SECONDS)
        process.kill()
        process.join()
        return process.exitcode, output.read()


def _start(target, *arguments):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
    process = FORKED.Process(target=target, args=arguments)
    process.start()
    return process


def _enter(environment: dict[str, str], folder: Path, output: str) -> None:
    """In the new process."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    opened = os.open(output, os.O_WRONLY)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    torch.set_num_threads(1)


def _run(script: Path, argv: list[str], environment: dict[str, str], folder: Path, output: str) -> None:
    _enter(environment, folder, output)
    sys.argv = [str(script), *argv]
    runpy.run_path(str(script), run_name="__main__")


def _command(words: list[str], environment: dict[str, str], folder: Path, output: str) -> None:
    _enter(environment, folder, output)
    from llm2clip_plugin import cli

    sys.exit(cli.main(words))
