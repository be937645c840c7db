"""``python``, ``deepspeed`` and ``llm2clip`` for shell scripts, forked from one process that has
their libraries.

A start takes a tenth of a second, not five. For tests of what a script does with its programs,
where others see how they start. What they start in turn, such as the ranks of DeepSpeed's launcher,
is forked as well.
"""

import atexit
import contextlib
import functools
import json
import multiprocessing
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from forked import context, run_as_main

POLL = 0.05  # seconds between two looks at a process
# -I and -S: a client needs no packages. It passes SIGTERM on; it and its process end together.
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

words = {words!r} + sys.argv[1:]
safe = "-P" in words[:2] or bool(os.environ.get("PYTHONSAFEPATH"))
while words[:1] in (["-u"], ["-P"]):
    del words[0]
is_program = bool(words) and (words[0] in ("-c", "-m") or os.path.isfile(words[0]))
if not is_program or words[:2] == ["-m", "pip"]:
    os.execv({python!r}, [{python!r}, *["-P"] * safe, *words])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"-"], [0, 1, 2])
    request = {{"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}}
    request |= {{"python": {shim!r}, "safe": safe}}
    server.sendall(json.dumps(request).encode() + b"\\n")
    signal.signal(signal.SIGTERM, lambda *_: server.sendall(b"\\n"))
    status = server.recv(16)
sys.exit(int(status or 1))
"""


def nothing() -> None:
    """What tests other than LLaVA's do first in a new process."""


@functools.cache
def programs(first: Callable[[], None] = nothing) -> Path:
    """The folder of the programs; the process that forks for them is started, and ends with this
    one.

    ``first`` is called in each new process, with its environment: what a ``sitecustomize`` would
    have done there.
    """
    folder = Path(tempfile.mkdtemp(prefix="programs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = str(folder / "socket")
    for name in ("python", "deepspeed", "llm2clip"):
        words = [] if name == "python" else [str(Path(sys.executable).with_name(name))]
        text = CLIENT.format(
            python=sys.executable,
            words=words,
            address=address,
            shim=str(folder / "python"),
        )
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        server = context().Process(target=_serve, args=(listener, first))
        server.start()
        atexit.register(server.terminate)  # before multiprocessing waits for it
    return folder


def _serve(listener: socket.socket, first: Callable[[], None]) -> None:
    """Fork for each client, until the process that started this one is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that attend
    parent = os.getppid()
    while os.getppid() == parent:
        if select.select([listener], [], [], 5)[0]:
            client, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _attend(client, first)
            client.close()


def _attend(client: socket.socket, first: Callable[[], None]) -> NoReturn:
    """Fork the client's process; tell its exit status, or end it when the client has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, *_ = socket.recv_fds(client, 1, 3)
    with client.makefile() as stream:
        request = json.loads(stream.readline())
    if (process := os.fork()) == 0:
        client.close()
        _become(request, streams, first)
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0):
        if select.select([client], [], [], POLL)[0]:
            terminated = client.recv(16)  # nothing if it is closed at the other end
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM if terminated else signal.SIGKILL)
    with contextlib.suppress(BrokenPipeError):
        client.sendall(str(os.waitstatus_to_exitcode(ended[1]) % 256).encode())
    os._exit(0)


def _become(
    request: dict[str, Any], streams: list[int], first: Callable[[], None]
) -> NoReturn:
    """In the new process: as if Python had started with the client's words."""
    import torch
    import transformers

    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
    # children start in the system's way
    multiprocessing.set_start_method(None, force=True)
    environment = request["environment"]
    words = request["words"]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["folder"])
    sys.executable = request["python"]
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    if level := environment.get("TRANSFORMERS_VERBOSITY"):
        transformers.logging.set_verbosity(getattr(transformers.logging, level.upper()))
    here = (
        str(Path(words[0]).resolve().parent)
        if words[0] not in ("-c", "-m")
        else request["folder"]
    )
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if not request["safe"]:
        sys.path.insert(0, here)
    # as a process of multiprocessing ends, with its threads
    sys.exit(run_as_main(words, first))
