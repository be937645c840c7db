"""A comparison as text: terminal and Markdown."""

from collections.abc import Sequence

from llava_integration.compare.comparison import Comparison, Row

NOTE = "reported by others, one run, no interval; VQAv2, VizWiz and MMBench on splits that a server scores"
HEADER = ("benchmark", "base", "new", "difference", "interval", "p", "p (Holm)", "wins", "losses", "verdict")


def number(value: float, unit: str = "%", *, signed: bool = False) -> str:
    """Two decimals; one for points in the thousands."""
    places = 1 if unit == "points" else 2
    text = f"{value:+.{places}f}" if signed else f"{value:.{places}f}"
    return text.replace("-0.00", "0.00") if signed and float(text) == 0 else text


def p_value(value: float) -> str:
    """Three decimals; smaller values as a bound."""
    return "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"


def cells(row: Row) -> tuple[str, ...]:
    """A row's columns under HEADER."""
    result = row.result
    return (
        row.title if row.unit == "%" else f"{row.title} ({row.unit})",
        number(result.base, row.unit) + _spread(result.spread_base, row),
        number(result.new, row.unit) + _spread(result.spread_new, row),
        number(result.difference, row.unit, signed=True),
        f"[{number(result.low, row.unit, signed=True)}, {number(result.high, row.unit, signed=True)}]",
        p_value(result.p),
        p_value(row.p_holm),
        str(row.wins),
        str(row.losses),
        row.verdict,
    )


def _spread(spread: float, row: Row) -> str:
    return f" ±{number(spread, row.unit)}" if spread else ""


def method_lines(comparison: Comparison) -> list[str]:
    """The statistical methods, in sentences."""
    settings = comparison.settings
    lines = [
        f"Intervals: {settings['level']:.0%}, paired bootstrap over images ({settings['resamples']} resamples, seed "
        f"{settings['seed']}), composite scores resampled as composites. p: permutation over images, two-sided; Holm "
        "over the benchmarks of a pair."
    ]
    if any(max(row.runs) > 1 for row in comparison.rows):
        lines.append(
            "With several runs per side, the interval includes their variance, and p is Student's (±: s.d. over runs)."
        )
    if any(row.runs == (1, 1) for row in comparison.rows):
        mme = any(row.benchmark == "mme" for row in comparison.rows)
        lines.append(
            "With one run per side, the interval covers the choice of questions but not the training seed"
            + ("; MME varies by about 20 points between identical runs." if mme else ".")
        )
    return lines


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Plain columns: first and last aligned left, others right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if place in (0, len(header) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [header, ["-" * min(width, 40) for width in widths], *rows]
    ]


def terminal(comparison: Comparison) -> str:
    """What `llm2clip compare` prints."""
    lines = [f"warning: {warning}" for warning in comparison.warnings]
    for name, rows in comparison.pairs():
        lines += [f"{name} (new) against {comparison.names[0]} (base)", ""]
        lines += aligned(HEADER, [cells(row) for row in rows])
        lines += ["", *(f"  {row.title}: {row.power_line()}" for row in rows)]
        lines += [f"  {row.title}: McNemar p {p_value(row.p_mcnemar)}" for row in rows if row.p_mcnemar is not None]
        lines += [f"  {row.title}: note: {note}" for row in rows for note in row.notes]
        lines.append("")
    if comparison.references:
        names = _published_names(comparison)
        lines += [f"Published, not measured here ({NOTE}):", ""]
        lines += aligned(
            ["", *(comparison.titles[name] for name in names), ""],
            [[label, *_reference(values, names), ""] for label, values in comparison.references.items()],
        )
        lines.append("")
    lines += [f"note: {note}" for note in comparison.notes]
    return "\n".join([*lines, *method_lines(comparison)])


def _published_names(comparison: Comparison) -> list[str]:
    """The benchmarks with a published number."""
    return [name for name in comparison.titles if any(name in values for values in comparison.references.values())]


def _reference(values: dict[str, float], names: Sequence[str]) -> list[str]:
    return [f"{values[name]:g}" if name in values else "" for name in names]


def escape_markdown(text: str) -> str:
    """Text without Markdown's markup and column separators."""
    for letter in "\\`*_{}[]<>|#":
        text = text.replace(letter, "\\" + letter)
    return text.replace("\n", " ")


def markdown(comparison: Comparison) -> str:
    """The tables for a README or an issue."""
    lines = ["# Comparison", "", *(f"**Warning**: {escape_markdown(one)}.\n" for one in comparison.warnings)]
    for name, rows in comparison.pairs():
        lines += [f"## {escape_markdown(name)} (new) against {escape_markdown(comparison.names[0])} (base)", ""]
        lines += ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 2) + "---|"]
        lines += ["| " + " | ".join(escape_markdown(cell) for cell in cells(row)) + " |" for row in rows]
        lines += ["", *(f"- {escape_markdown(row.title)}: {row.power_line()}." for row in rows)]
        lines += [f"- {escape_markdown(row.title)}: {escape_markdown(note)}." for row in rows for note in row.notes]
        lines.append("")
    if comparison.references:
        names = _published_names(comparison)
        lines += [f"Published, not measured here ({NOTE}):", ""]
        lines += ["| | " + " | ".join(comparison.titles[name] for name in names) + " |", "|---|" + "---:|" * len(names)]
        lines += [
            f"| *{label}* | " + " | ".join(_reference(values, names)) + " |"
            for label, values in comparison.references.items()
        ]
        lines.append("")
    lines += [f"Note: {escape_markdown(note)}." for note in comparison.notes]
    return "\n".join([*lines, *method_lines(comparison)]) + "\n"
