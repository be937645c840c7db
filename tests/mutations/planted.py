"""Bugs that tests must catch, of planted.txt; many were once planted and passed every test.

An entry is the bug's name, its file, what becomes what (``-`` and ``+``, parts of lines), and the
test that must fail.
"""

import re
from dataclasses import dataclass
from pathlib import Path


def lines_of(changed: list[str], sign: str) -> str:
    """What is behind - or +, a line each."""
    lines = [line[1:].removeprefix(" ") for line in changed if line.startswith(sign)]
    return "\n".join(lines)


@dataclass(frozen=True)
class Bug:
    """``old`` in ``file`` becomes ``new``; ``test``, a pytest id, must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str

    @classmethod
    def read(cls, entry: str) -> "Bug":
        """Of its lines; raises ValueError for others."""
        name, file, *changed, test = entry.split("\n")
        old = lines_of(changed, "-")
        new = lines_of(changed, "+")
        if (
            not old
            or [line[:1] for line in changed]
            != sorted(line[:1] for line in changed)[::-1]
        ):
            raise ValueError(
                f"planted.txt: {name!r} has no lines of - followed by lines of +"
            )
        return cls(name, file, old, new, test)

    def plant(self, text: str) -> str:
        """The file with the bug; raises ValueError unless ``old`` occurs once."""
        places = list(re.finditer(self.pattern, text))
        if len(places) != 1:
            times = f"occurs {len(places)} times in {self.file}"
            raise ValueError(f"{self.name}: {self.old!r} {times}")
        return text[: places[0].start()] + self.new + text[places[0].end() :]

    @property
    def pattern(self) -> str:
        """What finds ``old``: in Python as a formatter may have laid it out, elsewhere as it is."""
        if not self.file.endswith(".py"):
            return re.escape(self.old)
        tokens = re.findall(r"\w+|[^\w\s]", self.old)
        parts = [re.escape(tokens[0])]
        for token in tokens[1:]:
            # the formatter's, before a closing bracket
            comma = ",?" if token in ")]}" else ""
            parts.append(rf"{comma}\s*{re.escape(token)}")
        return "".join(parts)


ENTRIES = (
    Path(__file__)
    .with_name("planted.txt")
    .read_text(encoding="utf-8")
    .strip()
    .split("\n\n")
)
PLANTED = tuple(map(Bug.read, ENTRIES))
