"""The Hub and other servers: whether a name can be a repository, downloads, time limits and
retries. Standard library only until something is downloaded.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# environment variable: seconds that a server may take to connect, or to send more
TIMEOUT = "LLM2CLIP_TIMEOUT"


def timeout() -> float:
    """Seconds that a server may take to connect, and between two pieces of an answer."""
    text = os.environ.get(TIMEOUT) or "30"
    if not re.fullmatch(r"\d*\.?\d+", text) or not float(text):
        raise ValueError(f"{TIMEOUT} is {text!r}, expected seconds above 0")
    return float(text)


def can_only_be_a_path(name: str) -> bool:
    """Whether a name cannot be a Hub id: ``owner/name[@revision]`` or, of some old models,
    ``name``."""
    repository, _ = split_revision(name)
    return repository.startswith((".", "/", "~")) or repository.count("/") > 1


def split_revision(hub_id: str) -> tuple[str, str | None]:
    """``owner/name@revision`` as two parts: the revision (a commit, tag or branch) is None if none
    is given."""
    repository, _, revision = hub_id.partition("@")
    return repository, revision or None


def hub_snapshot(
    repository: str,
    *,
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
) -> Path:
    """The folder of a Hub repository's files, downloaded if they are not cached. ``repository`` may
    be ``owner/name@revision``.

    Raises TimeoutError if the Hub does not answer for ``timeout()`` seconds and nothing is cached,
    else ``huggingface_hub``'s OSError or ValueError."""
    from huggingface_hub import snapshot_download

    if revision is None:
        repository, revision = split_revision(repository)
    allowed = None if patterns is None else list(patterns)
    try:
        check_hub_answers(repository, revision=revision)
    except TimeoutError as silence:
        try:
            return Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=allowed,
                    local_files_only=True,
                )
            )
        except (OSError, ValueError):
            raise silence from None
    return Path(
        snapshot_download(repository, revision=revision, allow_patterns=allowed)
    )


def check_hub_answers(repository: str, *, revision: str | None = None) -> None:
    """Ask the Hub for a repository: any answer will do. Raises TimeoutError after ``timeout()``
    seconds without one."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().repo_info(repository, revision=revision, timeout=timeout())
    except Exception as error:  # of requests or of httpx, by the client's version
        if any("Timeout" in kind.__name__ for kind in type(error).__mro__):
            hub = f"the Hugging Face Hub ({constants.ENDPOINT})"
            problem = f"{hub} has not answered for {timeout():g} s ({TIMEOUT})"
            advice = "set HF_HUB_OFFLINE=1 to use downloaded files"
            raise TimeoutError(
                f"{problem}; check the network and HF_ENDPOINT, or {advice}"
            ) from error


LONGEST_RETRY_AFTER = 300.0  # seconds that a server may request
_jitter = random.Random()  # not the global generator, whose state belongs to the run


class Retry(NamedTuple):
    """When to try again, and when to give up."""

    tries: int = 8  # consecutive failures before giving up ...
    # ... or seconds spent in failed attempts, pauses not counted
    patience: float = 300.0
    first_pause: float = 0.5  # seconds after a failure, about; doubles up to ...
    longest_pause: float = 30.0

    def pause(self, failures: int) -> float:
        """Seconds before the next attempt, random so that many processes don't return together."""
        full = min(self.longest_pause, self.first_pause * 2 ** (failures - 1))
        return full * _jitter.uniform(0.5, 1.0)


def seconds_of_retry_after(header: str) -> float:
    """Seconds that a server wants to be left alone for, by the text of its header Retry-After; 0
    for a date."""
    return min(float(header), LONGEST_RETRY_AFTER) if header.strip().isdigit() else 0.0
