"""How long a server may take to answer; requests to the Hugging Face Hub, whose client waits without end for some."""

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = "LLM2CLIP_TIMEOUT"  # environment variable: seconds that a server may take to connect, or to send more
DEFAULT_TIMEOUT = 30.0


def timeout() -> float:
    """Seconds that a server may take to accept a connection, and between two pieces of an answer."""
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text or DEFAULT_TIMEOUT)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{TIMEOUT} is {text!r}, expected seconds above 0")
    return seconds


def can_only_be_a_path(name: str) -> bool:
    """Whether a name cannot be a Hub id, which is ``owner/name`` or, of some old models, ``name``."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def hub_snapshot(repository: str, *, revision: str | None = None, patterns: Sequence[str] | None = None) -> Path:
    """The folder of a Hub repository's files, downloaded if they are not in the local cache.

    Raises TimeoutError if the Hub does not answer for ``timeout()`` seconds and the cache has no snapshot, otherwise
    what ``huggingface_hub`` raises: OSError or ValueError. Its downloads have the timeout HF_HUB_DOWNLOAD_TIMEOUT.
    """
    from huggingface_hub import snapshot_download

    allowed = None if patterns is None else list(patterns)
    try:
        check_hub_answers(repository, revision=revision)
    except TimeoutError as silence:
        try:
            return Path(snapshot_download(repository, revision=revision, allow_patterns=allowed, local_files_only=True))
        except (OSError, ValueError):
            raise silence from None
    return Path(snapshot_download(repository, revision=revision, allow_patterns=allowed))


def check_hub_answers(repository: str, *, revision: str | None = None) -> None:
    """Ask the Hub for a repository: any answer will do. Raises TimeoutError after ``timeout()`` seconds without one."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().repo_info(repository, revision=revision, timeout=timeout())
    except Exception as error:  # of requests or of httpx, by the client's version
        if any("Timeout" in kind.__name__ for kind in type(error).__mro__):
            raise TimeoutError(
                f"the Hugging Face Hub ({constants.ENDPOINT}) has not answered for {timeout():g} s ({TIMEOUT}); "
                "check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use downloaded files"
            ) from error


# How often an error that may pass is retried, and how long apart. Standard library only.

LONGEST_RETRY_AFTER = 300.0  # seconds that a server may request
_jitter = random.Random()  # not the global generator, whose state belongs to the run


@dataclass(frozen=True)
class Retry:
    """How often, and how long apart."""

    tries: int = 8  # consecutive failures before giving up ...
    patience: float = 300.0  # ... or seconds spent in failed attempts, pauses not counted
    first_pause: float = 0.5  # seconds after a failure, about; doubles up to ...
    longest_pause: float = 30.0

    def pause(self, failures: int) -> float:
        """Seconds before the next attempt, random so that many processes don't return together."""
        full = min(self.longest_pause, self.first_pause * 2 ** (failures - 1))
        return full * _jitter.uniform(0.5, 1.0)


def seconds_of_retry_after(header: str) -> float:
    """Seconds that a server wants to be left alone for, by the text of its header Retry-After; 0 for any other."""
    from email.utils import parsedate_to_datetime  # here, because --help of every command imports this module

    try:
        seconds = float(header) if header.strip().isdigit() else parsedate_to_datetime(header).timestamp() - time.time()
    except (TypeError, ValueError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)
