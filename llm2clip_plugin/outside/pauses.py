"""How often an error that may pass is retried, and how long apart. Standard library only."""

import random
import time
from dataclasses import dataclass

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
