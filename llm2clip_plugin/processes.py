"""Processes that this package starts and ends, and their limit of open files. Python programs start
by the name of a module, without those of the working directory.

``python -m`` and ``python -c`` search the working directory first: a ``random.py`` next to the data
would run in place of the library's. PYTHONPATH is searched as ever. Standard library only; on
Python 3.10, too.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading

# environment variable of Python 3.11 and newer, which children inherit
SAFE_PATH = "PYTHONSAFEPATH"
# What -P does, for Python 3.10: nothing is imported before the working directory ("") is off the
# path.
RUN_MODULE = (
    "import sys; sys.path[0] or sys.path.pop(0); del sys.argv[0]; import runpy; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def python_module(module: str, *words: str) -> list[str]:
    """The command line of ``python -m MODULE WORDS``, by this Python."""
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", "-m", module, *words]
    return [sys.executable, "-c", RUN_MODULE, module, *words]


def on_ranks(ranks: int, module: str, *words: str) -> list[str]:
    """The command line that runs ``python_module`` in so many processes of this machine, by
    torchrun if several."""
    command = python_module(module, *words)
    if ranks == 1:
        return command
    # --no-python: torchrun's own `python -m` would search the working directory; -u is what it adds
    program = [command[0], "-u", *command[1:]]
    return python_module(
        "llm2clip_plugin.launch", f"--nproc_per_node={ranks}", "--no-python", *program
    )


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment with ``more``; Python programs don't import the working
    directory's modules."""
    return {SAFE_PATH: "1", **more, **os.environ}


def protect_children() -> None:
    """As ``child_environment``, for all that this process starts: loader processes, compilers,
    launchers."""
    os.environ.setdefault(SAFE_PATH, "1")


def end_children() -> None:
    """Kill the processes that this one has started with multiprocessing; those of a loader ignore
    SIGTERM."""
    if "multiprocessing" in sys.modules:
        import multiprocessing

        if threading.current_thread() is threading.main_thread():
            # torch's handler raises an error for a loader that is killed
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            child.kill()


def raise_open_files() -> int:
    """Raise the soft limit of open files to the hard one; processes started from here inherit it.
    Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):  # macOS has a lower limit of its own
            return soft
    return hard if hard != resource.RLIM_INFINITY else sys.maxsize
