"""The lines that ``llm2clip doctor`` prints; standard library only."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    subject: str
    state: str  # ok, warn or fail
    found: str  # version, path or state of the subject
    fix: str = ""  # command or step that fixes it; "" when ok

    def as_json(self) -> dict[str, str]:
        """The entry of ``llm2clip doctor --json``."""
        return {"subject": self.subject, "state": self.state, "found": self.found, "fix": self.fix}


def numbers(text: str) -> tuple[int, ...]:
    """``'2.13.0+cpu'`` -> (2, 13, 0), for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])
