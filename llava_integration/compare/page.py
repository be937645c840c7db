"""The report as one HTML file: verdicts, plots, tables, and the questions where the towers disagree.

Nothing is fetched: style, script, plots and pictures are in the file, and its content security policy allows no request
and no script but the one below (by hash). Answers are put into the page as text nodes, so markup in them is shown.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from llava_integration.compare import svg, tables
from llava_integration.compare.comparison import Comparison, Row
from llava_integration.compare.pictures import Pictures
from llava_integration.compare.sides import Side

HERE = Path(__file__).parent
LONGEST = 600  # characters of a question or an answer that are shown


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """What goes into the page."""

    images: Path | None = None  # folder of evaluation folders, or one benchmark's
    with_images: bool = True
    questions: int = 80  # disagreements a benchmark and pair, wins and losses evenly


def page(comparison: Comparison, sides: Sequence[Side], options: PageOptions) -> str:
    """The whole HTML text."""
    style, script = (HERE / "page.css").read_text(encoding="utf-8"), (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = f"{' · '.join(comparison.names[1:])} against {comparison.names[0]}"
    pictures = Pictures(sides, options.images if options.with_images else None, enabled=options.with_images)
    questions = [
        question for row in comparison.rows for question in disagreements(row, sides, pictures, options.questions)
    ]
    data = {"names": comparison.names, "questions": questions, "images": pictures.encoded}
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            *_verdicts(comparison),
            _section("Differences", svg.forest(comparison) + _table(comparison)),
            _section("All scores", _scores(comparison)),
            _section("Shape", svg.radar(comparison)) if len(comparison.titles) >= 3 else "",
            _section("By category", _all_categories(comparison)),
            _section(
                "What this many questions can show",
                _list(f"{row.title}: {row.power_line()}" for row in comparison.rows),
            ),
            _section("Where they disagree", _browser(comparison, questions)),
            _section("Notes", _notes(comparison, pictures)),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy, quote=True)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,">'
        f"<style>{style}</style></head>\n<body><main>\n{body}\n"
        f'</main><script type="application/json" id="data">{embedded(data)}</script>\n'
        f"<script>{script}</script></body></html>\n"
    )


def embedded(value: Any) -> str:
    """JSON that ends no script element and opens no comment, whatever the texts in it hold."""
    text = json.dumps(value, ensure_ascii=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _list(lines: Any) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def table(name: str, heads: str, lines: Sequence[str]) -> str:
    """A table element in a box that scrolls sideways."""
    body = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table id="{name}">{body}</table></div>'


def _verdicts(comparison: Comparison) -> list[str]:
    """One sentence for each pair of sides."""
    sentences = []
    for name, rows in tables.pairs(comparison):
        groups = {
            verdict: [
                f"{row.title} ({tables.number(row.result.difference, row.unit, signed=True)})"
                for row in rows
                if row.verdict == verdict
            ]
            for verdict in ("better", "worse")
        }
        said = [f"{verdict} on {', '.join(titles)}" for verdict, titles in groups.items() if titles]
        rest = len(rows) - sum(map(len, groups.values()))
        said += [f"no difference shown on {rest} of {len(rows)}"] if rest else []
        sentences.append(f'<p class="verdict"><b>{escape(name)}</b>: {escape("; ".join(said))}.</p>')
    return sentences


def _table(comparison: Comparison) -> str:
    """The comparison table; columns sort by click."""
    several = len(comparison.names) > 2
    header = ["new side", *tables.HEADER] if several else tables.HEADER
    lines = []
    for row in comparison.rows:
        result = row.result
        values = [row.title, result.base, result.new, result.difference, result.high - result.low, result.p,
                  row.p_holm, row.wins, row.losses, row.verdict]  # fmt: skip
        cells = "".join(
            f'<td data-value="{escape(str(value), quote=True)}">{escape(cell)}</td>'
            for value, cell in zip(values, tables.cells(row), strict=True)
        )
        if several:
            cells = f'<td data-value="{escape(row.new, quote=True)}">{escape(row.new)}</td>{cells}'
        lines.append(f'<tr class="{row.verdict.split()[0]}">{cells}</tr>')
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in header)
    return table("differences", heads, lines)


def _scores(comparison: Comparison) -> str:
    """Headline numbers of every side, and the published ones, marked; "" if the table of differences has them all."""
    names = list(comparison.titles)
    if len(comparison.names) == 2 and len(names) == len(comparison.rows) and not comparison.references:
        return ""
    heads = "".join(f'<th scope="col">{escape(comparison.titles[name])}</th>' for name in names)
    lines = []
    for place, side in enumerate(comparison.names):
        cells = "".join(
            f"<td>{tables.number(comparison.scores[name][side], comparison.units[name])}</td>"
            if side in comparison.scores[name]
            else "<td></td>"
            for name in names
        )
        lines.append(f'<tr><th scope="row">{_named_dot(comparison, place)}</th>{cells}</tr>')
    for label, values in comparison.references.items():
        cells = "".join(f"<td>{values[name]:g}</td>" if name in values else "<td></td>" for name in names)
        lines.append(f'<tr class="reference"><th scope="row">{escape(label)} <small>published</small></th>{cells}</tr>')
    note = f"<p class=dim>Published rows: {escape(tables.NOTE)}.</p>" if comparison.references else ""
    return table("scores", f"<th></th>{heads}", lines) + note


def _named_dot(comparison: Comparison, place: int) -> str:
    """A side's name behind a square of its colour."""
    return f'<span class="dot" style="background:{svg.colour(place)}"></span>{escape(comparison.names[place])}'


def _all_categories(comparison: Comparison) -> str:
    """Bars of every row, below the colours' names."""
    rows = [_categories(comparison, row) for row in comparison.rows if row.categories]
    sides = " ".join(f"<span>{_named_dot(comparison, place)}</span>" for place in range(len(comparison.names)))
    return f'<p class="legend">{sides}</p>{"".join(rows)}' if rows else ""


def _categories(comparison: Comparison, row: Row) -> str:
    name = row.title if len(comparison.names) == 2 else f"{row.title}: {row.new}"
    more = f"<p class=dim>the 20 largest of {len(row.categories)} categories</p>" if len(row.categories) > 20 else ""
    summary = f"<summary>{escape(name)}, mean score of a question</summary>"
    first = " open" if row is comparison.rows[0] else ""
    return f"<details{first}>{summary}{svg.bars(comparison, row)}{more}</details>"


def _browser(comparison: Comparison, questions: Sequence[dict]) -> str:
    """The controls; the script fills in the questions."""
    if not questions:
        return "<p>No question with an answer to show whose score differs.</p>"
    controls = []
    for name, label in (
        ("benchmark", "benchmark"),
        ("pair", "new side"),
        ("outcome", "outcome"),
        ("category", "category"),
    ):
        controls.append(f'<label>{label} <select id="filter-{name}"><option value="">all</option></select></label>')
    controls.append('<label>search <input id="filter-text" type="search" placeholder="question or answer"></label>')
    controls.append(
        '<label>sort <select id="sort"><option value="">as in the benchmark</option><option value="gap">largest gap '
        'first</option><option value="question">question</option><option value="category">category</option></select>'
        "</label>"
    )
    return (
        f'<form id="controls">{"".join(controls)}</form><p id="shown" aria-live="polite"></p><div id="questions"></div>'
        '<p class="pager"><button type="button" id="previous">previous</button> <span id="place"></span> '
        '<button type="button" id="next">next</button></p>'
        "<noscript><p>The browser of questions needs JavaScript.</p></noscript>"
    )


def _notes(comparison: Comparison, pictures: Pictures) -> str:
    lines = [*tables.method_lines(comparison), *comparison.notes]
    if any(max(row.runs) > 1 for row in comparison.rows):
        lines.append("Of several runs, the browser shows the answers of the first.")
    for row in comparison.rows:
        name = row.title if len(comparison.names) == 2 else f"{row.title}, {row.new}"
        lines += [f"{name}: {note}" for note in row.notes]
        if row.p_mcnemar is not None:
            lines.append(f"{name}: McNemar p {tables.p_value(row.p_mcnemar)} (images in common ignored)")
    return _list([*lines, *pictures.notes()])


def disagreements(row: Row, sides: Sequence[Side], pictures: Pictures, most: int) -> list[dict[str, Any]]:
    """Questions of a row whose scores differ, spread evenly over the benchmark, as the page shows them.

    None of retrieval: its items are queries, without words to show.
    """
    place = next(number for number, side in enumerate(sides) if side.name == row.new)
    old, now = (
        {str(item["id"]): item for item in side.runs[row.benchmark][0].items} for side in (sides[0], sides[place])
    )
    both = [
        (old[key], now[key])
        for key in old
        if key in now and "answer" in old[key] and "answer" in now[key] and counts_for_headline(old[key], now[key])
    ]
    won = [pair for pair in both if pair[1]["score"] > pair[0]["score"]]
    lost = [pair for pair in both if pair[1]["score"] < pair[0]["score"]]
    half = max(most // 2, most - len(won) if len(lost) > most // 2 else 0)
    chosen = [*spread(lost, min(half, len(lost))), *spread(won, most - min(half, len(lost)))]
    order = {id(pair): number for number, pair in enumerate(both)}  # wins and losses mixed, as in the benchmark
    chosen.sort(key=lambda pair: order[id(pair)])
    return [_question(row, place, base, new, pictures, (len(won), len(lost))) for base, new in chosen]


def counts_for_headline(base: dict, new: dict) -> bool:
    """Not ScienceQA's questions without an image: they say nothing about towers."""
    return bool(base.get("is_multimodal", True) or new.get("is_multimodal", True))


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many values, evenly from the whole list."""
    if len(values) <= most:
        return list(values)
    return [values[number * len(values) // most] for number in range(most)] if most > 0 else []


def _question(
    row: Row, place: int, base: dict, new: dict, pictures: Pictures, totals: tuple[int, int]
) -> dict[str, Any]:
    return {
        "benchmark": row.title,
        "pair": place,
        "id": str(base["id"]),
        "question": _short(base.get("question", "")),
        "choices": [_short(choice) for choice in base.get("choices", [])],
        "truth": _truth(base.get("truth")),
        "category": str(base.get("category") or ""),
        "answers": [_short(base.get("answer", "")), _short(new.get("answer", ""))],
        "missing": [bool(base.get("missing")), bool(new.get("missing"))],
        "scores": [round(float(base["score"]), 3), round(float(new["score"]), 3)],
        "rotations": [_rotations(base), _rotations(new)],
        "image": pictures.key(row.benchmark, base),
        "of": totals,
    }


def _rotations(item: dict) -> str:
    """MMBench: what was said to every rotation of the options."""
    rows = item.get("rows") or []
    said = [f"{_short(str(entry.get('text', '')))} ({'right' if entry.get('correct') else 'wrong'})" for entry in rows]
    return "; ".join(said) if len(rows) > 1 else ""


def _truth(value: Any) -> str:
    """The truth in a line: human answers with how many gave them."""
    if isinstance(value, list):
        counts = {str(answer): value.count(answer) for answer in value}
        return ", ".join(f"{answer} ×{count}" for answer, count in sorted(counts.items(), key=lambda entry: -entry[1]))
    return _short("" if value is None else str(value))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
