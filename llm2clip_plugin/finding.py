"""What ``llm2clip doctor`` reports, line by line; standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass

STATES = ("ok", "warn", "fail")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    subject: str
    state: str  # one of STATES
    found: str
    mend: str = ""  # the command or step that mends it; "" when ok


def numbers(text: str) -> tuple[int, ...]:
    """``'2.13.0+cpu'`` -> (2, 13, 0), for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])
