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
        lines += [*aligned(HEADER, [cells(row) for row in rows]), ""]
        lines += [f"  {row.title}: {row.power_line()}" for row in rows]
        lines += [f"  {row.title}: note: {note}" for row in rows for note in row.notes]
        lines.append("")
    if comparison.references:
        header, *models = _published(comparison)
        lines += [
            f"Published, not measured here ({NOTE}):",
            "",
            *aligned([*header, ""], [[*row, ""] for row in models]),
            "",
        ]
    lines += [f"note: {note}" for note in comparison.notes]
    return "\n".join([*lines, *method_lines(comparison)])


def markdown(comparison: Comparison) -> str:
    """The tables for a README or an issue."""
    lines = ["# Comparison", "", *(f"**Warning**: {escape_markdown(one)}.\n" for one in comparison.warnings)]
    for name, rows in comparison.pairs():
        lines += [f"## {escape_markdown(name)} (new) against {escape_markdown(comparison.names[0])} (base)", ""]
        lines += [*_markdown_table([HEADER, *map(cells, rows)]), ""]
        lines += [f"- {escape_markdown(f'{row.title}: {row.power_line()}')}." for row in rows]
        lines += [f"- {escape_markdown(f'{row.title}: {note}')}." for row in rows for note in row.notes]
        lines.append("")
    if comparison.references:
        lines += [f"Published, not measured here ({NOTE}):", "", *_markdown_table(_published(comparison)), ""]
    lines += [f"Note: {escape_markdown(note)}." for note in comparison.notes]
    return "\n".join([*lines, *method_lines(comparison)]) + "\n"


def _published(comparison: Comparison) -> list[list[str]]:
    """A header and a row for each model with published numbers."""
    names = [name for name in comparison.titles if any(name in values for values in comparison.references.values())]
    rows = [
        [model, *(f"{values[name]:g}" if name in values else "" for name in names)]
        for model, values in comparison.references.items()
    ]
    return [["", *(comparison.titles[name] for name in names)], *rows]


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first row is the header."""
    lines = ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in rows]
    return [lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]]


def escape_markdown(text: str) -> str:
    """Text without Markdown's markup and column separators."""
    for letter in "\\`*_{}[]<>|#":
        text = text.replace(letter, "\\" + letter)
    return text.replace("\n", " ")
