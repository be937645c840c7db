"""Ctrl-C while a rank loads ends it at once, with a line from rank 0 and exit status 130. Standard library only.

A KeyboardInterrupt would be raised in whatever the main thread does there: an import that swallows it, a rendezvous in
C++ that prints its stack and goes on, a collective that fails because the other ranks are gone. So the main thread
blocks the signal, and a thread that does nothing else waits for it.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STATUS = 130  # a shell's for SIGINT
_waiting: threading.Thread | None = None


@contextmanager
def interrupt_ends_rank() -> Iterator[None]:
    """Ctrl-C ends this process, until `loaded` is called or the block is left."""
    global _waiting
    if _waiting is None:
        _waiting = threading.Thread(target=_wait, daemon=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # threads that start from here on block it, too
        _waiting.start()
    try:
        yield
    finally:
        loaded()


def loaded() -> None:
    """From now on a Ctrl-C is left to the handlers of Python: there is something to save. Called by the main thread."""
    global _waiting
    thread, _waiting = _waiting, None
    if thread is not None and thread.ident is not None:
        signal.pthread_kill(thread.ident, signal.SIGINT)
        thread.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _wait() -> None:
    signal.sigwait({signal.SIGINT})
    if _waiting is threading.current_thread():
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"\ninterrupted\n" if os.isatty(2) else b"interrupted\n")
        os._exit(STATUS)
