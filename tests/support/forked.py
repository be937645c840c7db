"""Processes forked from one that has imported torch, DeepSpeed and this package: a start costs no
imports."""

import atexit
import functools
import multiprocessing
import os
import runpy
import sys
import tempfile
import weakref
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

SECONDS = 300  # of a command; then it is killed


@functools.cache
def context() -> ForkServerContext:
    """Makes processes that are forked from a server with ``forked_libraries``, which starts
    here."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["forked_libraries"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
    # the server gets no other path
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path)):
        forkserver.ensure_running()
    return made


class Process:
    """A process with the surface of ``subprocess.Popen``; what it prints is in ``output``."""

    def __init__(
        self,
        target: Callable[..., None],
        argument: object,
        words: list[str],
        *more: object,
    ) -> None:
        descriptor, name = tempfile.mkstemp()
        os.close(descriptor)
        self._log = Path(name)
        weakref.finalize(self, self._log.unlink)
        self._process = context().Process(
            target=_enter, args=(target, argument, words, *more, name)
        )
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def output(self) -> str:
        """What it has printed so far, stdout and stderr together."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        return self._process.exitcode


class Script(Process):
    """``python SCRIPT WORDS``."""

    def __init__(
        self, script: Path, words: list[str], environment: dict[str, str], folder: Path
    ) -> None:
        super().__init__(_run, script, words, environment, folder)


class Module(Process):
    """``python -m MODULE WORDS``, whose exit handlers run; ``first`` is a function that is called
    before it."""

    def __init__(
        self,
        module: str,
        words: list[str],
        environment: dict[str, str],
        folder: Path,
        first: Callable[[], None],
    ) -> None:
        super().__init__(_module, (module, first), words, environment, folder)


class Command(Process):
    """``llm2clip WORDS``."""

    def __init__(
        self, words: list[str], environment: dict[str, str], folder: Path
    ) -> None:
        super().__init__(_command, None, words, environment, folder)


def run_command(
    words: list[str], environment: dict[str, str], folder: Path
) -> tuple[int | None, str]:
    """``llm2clip WORDS``: exit status and output."""
    command = Command(words, environment, folder)
    try:
        return command.wait(SECONDS), command.output
    except TimeoutError:
        command.kill()
        return None, command.output


def _enter(
    target: Callable[..., None],
    argument: object,
    words: list[str],
    environment: dict[str, str],
    folder: Path,
    log: str,
) -> None:
    """In the new process."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    opened = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    torch.set_num_threads(1)
    target(argument, words)


def _run(script: Path, words: list[str]) -> None:
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


def _module(given: tuple[str, Callable[[], None]], words: list[str]) -> None:
    module, first = given
    sys.exit(run_as_main(["-m", module, *words], first))


def run_as_main(words: list[str], first: Callable[[], None]) -> int:
    """``python WORDS`` (``-m MODULE``, ``-c CODE`` or a script), to the end of its exit handlers;
    its exit status."""
    atexit._clear()  # those of the process that this one is forked from
    first()
    kind, name = (words[0], words[1]) if words[0] in ("-c", "-m") else ("", words[0])
    sys.argv = [name if kind == "-m" else words[0], *words[2 if kind else 1 :]]
    status = 0
    try:
        if kind == "-m":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(compile(name, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    atexit._run_exitfuncs()
    return status


def _command(_: None, words: list[str]) -> None:
    from llm2clip_plugin import cli

    cli.leave(cli.main(words))
