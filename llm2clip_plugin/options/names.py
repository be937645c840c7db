"""What options are called: one name for one thing in all commands, and what other programs call it.

A setting is a field of nested dataclasses, ``optim.lr``. Its option is the last part, ``--lr``, where only one field of
the command ends in it; else the dotted name, or the one that the command chooses. Every option is also understood by
its dotted name, with underscores, and under the names below; ``--help`` shows one. docs/options.md has the table.
"""

import difflib
import typing
from collections import Counter
from collections.abc import Iterable, Mapping

# Names of Hugging Face's Trainer and of LLaVA's scripts -> the name now; not shown in --help.
ALSO = {
    "data-path": "data",
    "output-dir": "output",
    "learning-rate": "lr",
    "lr-scheduler-type": "schedule",
    "per-device-train-batch-size": "micro-batch",
    "dataloader-num-workers": "workers",
    "resume-from-checkpoint": "resume",
    "vision-tower": "tower",
    "model-name-or-path": "llm",
}

HELP, HELP_ALL = ("-h", "--help"), ("--help-all", "--help_all")


def normal(name: str) -> str:
    """``max_steps`` and ``--max-steps`` as ``max-steps``."""
    return name.removeprefix("--").replace("_", "-")


class Names:
    """The names of the fields of one command's settings."""

    def __init__(self, fields: Iterable[str], shown: Mapping[str, str], also: Mapping[str, str]) -> None:
        """``shown``: names that a command chooses; of a field, or of a section (then before the field's last part).

        ``also``: further names that are understood -> the field. Names are without the two dashes.
        """
        fields = tuple(fields)
        leaves = Counter(name.rpartition(".")[2] for name in fields)
        self.shown = {name: self._choose(name, shown, leaves) for name in fields}
        self.fields = {name: field for field, name in self.shown.items()}
        if len(self.fields) != len(fields):
            twice = [name for name, count in Counter(self.shown.values()).items() if count > 1]
            raise AssertionError(f"options with one name: {twice}")
        for name, field in also.items():
            self.fields.setdefault(normal(name), field)
        for field in fields:
            self.fields.setdefault(normal(field), field)
            if leaves[leaf := field.rpartition(".")[2]] == 1:
                self.fields.setdefault(normal(leaf), field)
        for name, now in ALSO.items():
            if now in self.fields:
                self.fields.setdefault(name, self.fields[now])

    @staticmethod
    def _choose(field: str, shown: Mapping[str, str], leaves: Mapping[str, int]) -> str:
        section, _, leaf = field.rpartition(".")
        if field in shown:
            return shown[field]
        if section in shown:
            return f"{shown[section]}{normal(leaf)}"
        return normal(leaf if leaves[leaf] == 1 else field)

    def flag(self, field: str) -> str:
        """``--lr`` of ``optim.lr``."""
        return f"--{self.shown[field]}"

    def nearest(self, name: str, more: Iterable[str] = ()) -> str:
        """``; did you mean --lr?``, with the shown name of what comes nearest; "" if nothing does.

        ``more``: names of options that are no fields.
        """
        flags = {**{given: self.flag(field) for given, field in self.fields.items()}, **{o: f"--{o}" for o in more}}
        return nearest(normal(name), flags, flags.__getitem__)


def joined(text: str, more: str) -> str:
    """``text; more``, or ``text more`` after a question."""
    return f"{text} {more}" if text.endswith("?") else f"{text}; {more}"


def unknown(kind: str, name: object, known: Iterable[object], *, also: str = "") -> str:
    """``unknown recipe 'bse'; did you mean 'base'? known: base, quickstart``; ``also`` follows the known names."""
    names = [str(one) for one in known]
    return joined(f"unknown {kind} {name!r}{nearest(str(name), names)}", f"known: {', '.join(names)}{also}")


def nearest(name: str, known: Iterable[str], write: typing.Callable[[str], str] = repr) -> str:
    """``; did you mean 'NAME'?`` with the known name that comes nearest; "" if none is near."""
    near = closest(name, known)
    return f"; did you mean {write(near)}?" if near else ""


def closest(name: str, known: Iterable[str], similar: float = 0.6) -> str:
    """The known name with the fewest slips among those whose similarity by difflib is at least ``similar``; "" if none
    is. difflib's own order takes ``ties`` for ``sutie``, not ``suite``."""
    near = difflib.get_close_matches(name, known := list(known), n=len(known) or 1, cutoff=similar)
    return min(near, key=lambda one: slips(name, one), default="")  # of equal ones, the most similar


def slips(a: str, b: str) -> int:
    """Letters inserted, deleted, replaced or swapped with their neighbor on the way from ``a`` to ``b``.

    >>> slips("sutie", "suite"), slips("sutie", "ties")
    (1, 3)
    """
    before, last = [], list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (letter != other)))
            if i > 1 and j > 1 and (letter, a[i - 2]) == (b[j - 2], other):
                row[-1] = min(row[-1], before[j - 2] + 1)
        before, last = last, row
    return last[-1]
