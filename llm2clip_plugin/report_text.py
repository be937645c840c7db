"""Numbers and tables as reports write them."""

from collections.abc import Callable, Sequence
from statistics import fmean, stdev

# Numbers in tables.


def fraction(value: float) -> str:
    """Three decimals without a leading zero: ``.127``, ``1.000``."""
    return f"{value:.3f}".removeprefix("0")


def signed(value: float) -> str:
    """``+.069``, ``-.002``."""
    return f"{value:+.3f}".replace("0.", ".", 1)


def p_value(p: float) -> str:
    """``< .001`` or ``.038``."""
    return "< .001" if p < 0.001 else fraction(p)


def estimate(
    value: float, ends: Sequence[float], to_text: Callable[[float], str] = signed
) -> str:
    """A difference with its interval: ``+.069 [+.061, +.077]``."""
    return f"{to_text(value)} [{', '.join(map(to_text, ends))}]"


def spread(values: Sequence[float], to_text: Callable[[float], str] = fraction) -> str:
    """Mean over seeds, with the standard deviation if they differ: ``.127 ± .009``."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    mean = to_text(fmean(values))
    return f"{mean} ± {to_text(deviation)}" if deviation else mean


def markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:], ""])
