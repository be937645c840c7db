"""The nearest of the known names, for messages about an unknown one."""

import difflib
from collections.abc import Callable, Iterable


def unknown(kind: str, name: object, known: Iterable[object], *, also: str = "") -> str:
    """``unknown recipe 'bse'; did you mean 'base'? known: base, quickstart``; ``also`` follows the known names."""
    names = [str(one) for one in known]
    return joined(f"unknown {kind} {name!r}{nearest(str(name), names)}", f"known: {', '.join(names)}{also}")


def nearest(name: str, known: Iterable[str], write: Callable[[str], str] = repr) -> str:
    """``; did you mean 'NAME'?`` with the known name that comes nearest; "" if none is near."""
    near = closest(name, known)
    return f"; did you mean {write(near)}?" if near else ""


def closest(name: str, known: Iterable[str], similar: float = 0.6) -> str:
    """The most similar known name; "" if none is at least ``similar`` by difflib's ratio."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=similar)), "")


def joined(text: str, more: str) -> str:
    """``text; more``, or ``text more`` after a question."""
    return f"{text} {more}" if text.endswith("?") else f"{text}; {more}"
