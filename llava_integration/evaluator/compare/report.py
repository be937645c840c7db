"""A comparison as Markdown, for the terminal, too."""

import re
from collections.abc import Iterable, Sequence

from llava_integration.evaluator.compare.blind import MISSED, Part
from llava_integration.evaluator.compare.comparison import Comparison, Row
from llm2clip_plugin.report_text import p_value

NOTE = (
    "reported by others, one run, no interval; "
    "VQAv2, VizWiz and MMBench on splits that a server scores"
)
HEADER = (
    "benchmark",
    "base",
    "new",
    "difference",
    "interval (Holm)",
    "p",
    "p (Holm)",
    "wins",
    "losses",
    "verdict",
)


def number(value: float, unit: str = "%", *, signed: bool = False) -> str:
    """Two decimals; one for points in the thousands."""
    places = 1 if unit == "points" else 2
    value = round(value, places) or 0.0  # not -0.0
    if signed and value:
        return f"{value:+.{places}f}"
    return f"{value:.{places}f}"


def with_spread(value: float, spread: float, unit: str) -> str:
    """A score and its standard deviation over runs, if there are several."""
    text = number(value, unit)
    return f"{text} ±{number(spread, unit)}" if spread else text


def cells(row: Row, *, markdown: bool = False) -> tuple[str, ...]:
    """A row's columns under HEADER."""
    result = row.result
    title = plain(row.title) if markdown else row.title
    if row.unit != "%":
        title = f"{title} ({row.unit})"
    low, high = (number(end, row.unit, signed=True) for end in row.interval)
    return (
        title,
        with_spread(result.base, result.spread_base, row.unit),
        with_spread(result.new, result.spread_new, row.unit),
        number(result.difference, row.unit, signed=True),
        f"[{low}, {high}]",
        p_value(result.p),
        p_value(row.p_holm),
        str(row.wins),
        str(row.losses),
        row.verdict,
    )


PARTS_HEADER = (
    "benchmark",
    "questions",
    "number",
    "base",
    "new",
    "difference",
    "interval (Holm)",
    "p",
    "p (Holm)",
    "verdict",
)


def part_cells(row: Row, part: Part, *, markdown: bool = False) -> tuple[str, ...]:
    """A part's columns under PARTS_HEADER."""
    title = plain(row.title) if markdown else row.title
    if not part.has_mean:
        blanks = [""] * (len(PARTS_HEADER) - 4)
        return (title, part.name, str(part.questions), *blanks, part.verdict)
    low, high = (number(end, signed=True) for end in part.interval)
    return (
        title,
        part.name,
        str(part.questions),
        number(part.base),
        number(part.new),
        number(part.difference, signed=True),
        f"[{low}, {high}]",
        p_value(part.p),
        p_value(part.p_holm),
        part.verdict,
    )


def method_lines(comparison: Comparison) -> list[str]:
    """The statistical methods, in sentences."""
    level = comparison.settings["level"]
    lines = [
        f"Verdicts: at most {100 - 100 * level:.4g} % of errors over all rows together (Holm). An "
        "interval has the level at which Holm's correction tests its row, so that it excludes 0 "
        "where there is a verdict, and only there. p and intervals: paired t test over clusters "
        "(the items of one image), composite scores compared as composites."
    ]
    runs = [row.runs for row in comparison.rows]
    if any(max(counts) > 1 for counts in runs):
        variance = "their variance"
        if comparison.settings.get("pair_runs"):
            variance = "the variance of their differences, run by run of equal number"
        lines.append(
            f"With several runs a side, p and interval include {variance} (±: s.d.)."
        )
    if comparison.groups:
        lines.append(
            "Letters: two models share one if and only if no verdict tells them apart. If models "
            "are equally good, the probability that any two of them share none is at most "
            f"{1 - level:.2g}, over all benchmarks together."
        )
    if any(row.parts for row in comparison.rows):
        lines.append(
            "Solved blind: questions that some blind log answers right. A verdict on these holds "
            "with and without those that luck solved, one on the others also if the logs missed "
            f"{MISSED:.0%} of what can be solved blind. p (Holm) and intervals: over both parts of "
            "all benchmarks together."
        )
    if (1, 1) in runs:
        line = (
            "With one run a side, p and interval cover the choice of questions, "
            "not the training seed"
        )
        if "mme" in comparison.titles:
            line += "; MME varies by about 20 points between identical runs"
        lines.append(f"{line}.")
    return lines


def row_lines(rows: Sequence[Row], *, markdown: bool = False) -> list[str]:
    """What each row's questions can detect, and its notes."""
    lines = []
    for row in rows:
        title = plain(row.title) if markdown else row.title
        for line in (row.power_line(), *row.notes):
            lines.append(f"{title}: {plain_sentence(line) if markdown else line}")
    return lines


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, its columns aligned: the first and the last left, others
    right."""
    lines = [list(map(escaped_cell, line)) for line in (header, *rows)]
    columns = zip(*lines, strict=True)
    first_width, *inner_widths, _ = (max(map(len, column)) for column in columns)
    aligned = []
    for first, *inner, last in lines:
        padded = [first.ljust(first_width)]
        for cell, width in zip(inner, inner_widths, strict=True):
            padded.append(cell.rjust(width))
        aligned.append([*padded, last])
    rule = ["-" * first_width]
    rule += ["-" * (width - 1) + ":" for width in inner_widths]
    rule.append("---")
    header_line, *row_lines = aligned
    return [f"| {' | '.join(line)} |" for line in (header_line, rule, *row_lines)]


def plain(name: str) -> str:
    """A name in Markdown: no link, emphasis, code or HTML of its own, on one line."""
    # an underscore within a word is no emphasis
    special = r"([\\`*<\[\]~]|(?<![^\W_])_|_(?![^\W_]))"
    return re.sub(special, r"\\\1", " ".join(name.split()))


def plain_sentence(text: str) -> str:
    """A sentence with names in it: no link, emphasis or HTML of theirs; code stays code."""
    text = " ".join(text.split())
    return re.sub(r"(<|\*|\](?=\())", r"\\\1", text)


def escaped_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def text(comparison: Comparison) -> str:
    """The tables and notes, in Markdown."""
    lines = [
        f"- **Warning**: {plain_sentence(warning)}." for warning in comparison.warnings
    ]
    for new, base, rows in comparison.pairs():
        lines += [
            "",
            f"## {plain(new)} (new) against {plain(base)} (base)",
            "",
            *table(HEADER, [cells(row, markdown=True) for row in rows]),
            "",
        ]
        lines += [f"- {line}" for line in row_lines(rows, markdown=True)]
        of_parts = []
        for row in rows:
            for part in row.parts:
                of_parts.append(part_cells(row, part, markdown=True))
        if of_parts:
            lines += ["", "### Which questions need eyes", ""]
            lines += table(PARTS_HEADER, of_parts)
    if comparison.groups:
        lines += ["", "## Which models can be told apart?", ""]
        lines += table(("", *map(plain, comparison.names), ""), group_rows(comparison))
    if comparison.references:
        published = []
        for model, values in comparison.references.items():
            numbers = [
                f"{values[name]:g}" if name in values else ""
                for name in comparison.titles
            ]
            published.append([model, *numbers])
        lines += [
            "",
            f"Published, not measured here ({NOTE}):",
            "",
            *table(["", *map(plain, comparison.titles.values())], published),
        ]
    lines += [
        "",
        *(f"- {plain_sentence(note)}" for note in comparison.notes),
        *(f"- {line}" for line in method_lines(comparison)),
    ]
    return "\n".join(lines).strip() + "\n"


def group_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """A row for each benchmark: the scores with letters, and the unit if it is not percent."""
    rows = []
    for name, labels in comparison.groups.items():
        unit = comparison.units[name]
        cells = [plain(comparison.titles[name])]
        for side in comparison.names:
            score = ""
            if side in labels:
                score = f"{number(comparison.scores[name][side], unit)} {labels[side]}"
            cells.append(score)
        rows.append((*cells, "" if unit == "%" else unit))
    return rows
