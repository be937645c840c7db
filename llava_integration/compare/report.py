"""A comparison as Markdown, for the terminal, too, and as one HTML file.

The page fetches nothing: style, script, drawings and pictures are in it, and its content security
policy allows no request and no script but its own (by hash). The template escapes every text; the
script inserts answers as text. Pictures are below ``--image-folder``, or in the folder that was
scored, if its annotations are still those that were scored: a score file from elsewhere must not
bring another picture of this machine into a page that is passed on.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llava_integration.benchmarks.benchmark import Item, find_image
from llava_integration.benchmarks.rules import benchmarks
from llava_integration.compare.comparison import Comparison, Row, Run, Side, paired_runs
from llm2clip_plugin.bootstrap import p_value
from llm2clip_plugin.console import page_style, render, thumbnail
from llm2clip_plugin.contracts import sha256_text

HERE = Path(__file__).parent
FULL_MME = 20.0  # points of MME perception that are one percent of its 2000
LONGEST = 600  # characters of a question or an answer that are shown
NOTE = "reported by others, one run, no interval; VQAv2, VizWiz and MMBench on splits that a server scores"
HEADER = (
    "benchmark",
    "base",
    "new",
    "difference",
    "interval",
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
    return f"{value:{'+' if signed and value else ''}.{places}f}"


def cells(row: Row) -> tuple[str, ...]:
    """A row's columns under HEADER."""
    result = row.result
    sides = ((result.base, result.spread_base), (result.new, result.spread_new))
    ends = (number(value, row.unit, signed=True) for value in (result.low, result.high))
    return (
        row.title if row.unit == "%" else f"{row.title} ({row.unit})",
        *(
            number(value, row.unit) + (f" ±{number(spread, row.unit)}" if spread else "")
            for value, spread in sides
        ),
        number(result.difference, row.unit, signed=True),
        f"[{', '.join(ends)}]",
        p_value(result.p),
        p_value(row.p_holm),
        str(row.wins),
        str(row.losses),
        row.verdict,
    )


def method_lines(comparison: Comparison) -> list[str]:
    """The statistical methods, in sentences."""
    settings = comparison.settings
    runs = [row.runs for row in comparison.rows]
    lines = [
        "Intervals: {level:.0%}, paired bootstrap over images ({resamples} resamples, seed {seed}), composite scores "
        "resampled as composites. p: permutation over images, two-sided; Holm over all rows.".format(
            **settings
        )
    ]
    if any(max(counts) > 1 for counts in runs):
        lines.append(
            "With several runs a side, the interval includes their variance, and p is Student's (±: s.d.)."
        )
    if (1, 1) in runs:
        mme = "; MME varies by about 20 points between identical runs" * (
            "mme" in comparison.titles
        )
        lines.append(
            f"With one run a side, the interval covers the choice of questions, not the training seed{mme}."
        )
    return lines


def row_lines(rows: Sequence[Row]) -> list[str]:
    """What each row's questions can detect, and its notes."""
    return [f"{row.title}: {line}" for row in rows for line in (row.power_line(), *row.notes)]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, its columns aligned: the first and the last left, others
    right."""
    lines = [
        [cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (header, *rows)
    ]
    *widths, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
    shown = [
        [
            first.ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(inner, widths[1:], strict=True)),
            last,
        ]
        for first, *inner, last in lines
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:]), "---"]
    return ["| " + " | ".join(line) + " |" for line in (shown[0], rule, *shown[1:])]


def text(comparison: Comparison) -> str:
    """The tables and notes, in Markdown."""
    lines = [f"- **Warning**: {warning}." for warning in comparison.warnings]
    for new, base, rows in comparison.pairs():
        lines += [
            "",
            f"## {new} (new) against {base} (base)",
            "",
            *table(HEADER, map(cells, rows)),
            "",
        ]
        lines += [f"- {line}" for line in row_lines(rows)]
    if published := comparison.references:
        shown = [
            [model, *(f"{values[name]:g}" if name in values else "" for name in comparison.titles)]
            for model, values in published.items()
        ]
        lines += [
            "",
            f"Published, not measured here ({NOTE}):",
            "",
            *table(["", *comparison.titles.values()], shown),
        ]
    lines += ["", *(f"- {note}" for note in (*comparison.notes, *method_lines(comparison)))]
    return "\n".join(lines).strip() + "\n"


def page(
    comparison: Comparison,
    sides: Sequence[Side],
    *,
    images: Path | None = None,
    questions: int = 80,
) -> str:
    """The page's HTML. ``images``: folder of evaluation folders, or of one benchmark;
    ``questions``: disagreements per benchmark and pair of sides, wins and losses evenly."""
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    encoded: dict[str, str | None] = {}
    shown = []
    for row in (row for row in comparison.rows if row.base == comparison.names[0]):
        place = comparison.names.index(row.new)
        (base_run, *_), (new_run, *_), _ = paired_runs(row.benchmark, sides[0], sides[place])
        folders = picture_folders(row.benchmark, [base_run, new_run], images)
        for base, new in disagreements(base_run.items, new_run.items, questions):
            picture = picture_key(row.benchmark, base, folders, encoded)
            shown.append(
                {"benchmark": row.title, "pair": place, "image": picture, **_question(base, new)}
            )
    notes = [*method_lines(comparison), *comparison.notes]
    for new, base, rows in comparison.pairs():
        notes += [
            f"{new} against {base}: {line}" if len(sides) > 2 else line for line in row_lines(rows)
        ]
    if any(max(row.runs) > 1 for row in comparison.rows):
        notes.append("With several runs, the browser shows the answers of the first.")
    missing = sum(uri is None for uri in encoded.values())
    # zero and each row's low end, estimate and high end, as fractions of a drawing's width, all on
    # one scale
    ends = []
    for row in comparison.rows:
        size = FULL_MME if row.unit == "points" else 1.0
        ends.append(
            [0.0, *(end / size for end in (row.result.low, row.result.difference, row.result.high))]
        )
    low = min(map(min, ends))
    high = max(map(max, ends))
    drawn = [[(end - low) / ((high - low) or 1) for end in row] for row in ends]
    return render(
        HERE / "page.html",
        comparison=comparison,
        title=f"{' · '.join(comparison.names[1:])} against {comparison.names[0]}",
        policy="default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        style=page_style() + (HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        notes=notes,
        missing=missing,
        data={"names": comparison.names, "questions": shown, "images": encoded},
        drawn=drawn,
        header=HEADER,
        cells=cells,
        number=number,
        published=NOTE,
    )


def picture_folders(name: str, runs: Sequence[Run], root: Path | None) -> list[Path]:
    """Where a benchmark's pictures are searched: below ``root`` (--image-folder), else in the data
    that were scored."""
    rule = benchmarks().get(name)
    if root is not None:
        return [root / below for below in (*(rule.folders if rule else ()), "")]
    scored = {(str(run.provenance.get("data")), run.provenance.get("data_sha256")) for run in runs}
    return [
        Path(data)
        for data, digest in sorted(scored, key=str)
        # the digest of a folder without annotations is that of nothing, and says nothing
        if rule
        and digest != sha256_text("")
        and Path(data).exists()
        and rule.data_digest(Path(data)) == digest
    ]


def picture_key(
    name: str, item: Item, folders: Sequence[Path], encoded: dict[str, str | None]
) -> str:
    """The key of an item's picture, "" if there is none; ``encoded`` gets its data URI, None if it
    is not found."""
    rule = benchmarks().get(name)
    image = str(item.get("image") or "")
    key = f"{name}/{image}"
    if image and key not in encoded:
        found = (
            rule.image_bytes(folder, item) if rule else find_image(("", "images"), folder, image)
            for folder in folders
        )
        encoded[key] = thumbnail(next(filter(None, found), None))
    return key if encoded.get(key) else ""


def disagreements(base: Sequence[Item], new: Sequence[Item], most: int) -> list[tuple[Item, Item]]:
    """At most so many questions whose scores differ: wins and losses evenly, spread over the
    benchmark, in its order. Items without an answer, such as the queries of retrieval, are left
    out."""
    pairs = [pair for pair in zip(base, new, strict=True) if all("answer" in item for item in pair)]
    # ScienceQA-IMG
    pairs = [pair for pair in pairs if any(item.get("is_multimodal", True) for item in pair)]
    won = [place for place, (old, now) in enumerate(pairs) if now["score"] > old["score"]]
    lost = [place for place, (old, now) in enumerate(pairs) if now["score"] < old["score"]]
    losses = min(len(lost), max(most // 2, most - len(won)))
    chosen = (
        places[number * len(places) // count]
        for places, count in ((lost, losses), (won, min(len(won), most - losses)))
        for number in range(count)
    )
    return [pairs[place] for place in sorted(chosen)]


def _question(base: Item, new: Item) -> dict[str, Any]:
    """What the page's browser shows of a question."""
    return {
        "id": str(base["id"]),
        "question": _short(base.get("question")),
        "choices": [_short(choice) for choice in base.get("choices", [])],
        "truth": _short(base.get("truth")),
        "category": str(base.get("category") or ""),
        "answers": [_short(item.get("answer")) for item in (base, new)],
        "missing": [bool(item.get("missing")) for item in (base, new)],
        "scores": [round(float(item["score"]), 3) for item in (base, new)],
        "rotations": [_rotations(item) for item in (base, new)],
    }


def _rotations(item: Item) -> str:
    """MMBench's answers to every rotation of the options."""
    rows = item.get("rows") or []
    texts = [
        f"{_short(entry.get('text'))} ({'right' if entry.get('correct') else 'wrong'})"
        for entry in rows
    ]
    return "; ".join(texts) if len(rows) > 1 else ""


def _short(value: Any) -> str:
    """A text in one line of the page; of human answers each with its count."""
    if isinstance(value, list):
        value = ", ".join(
            f"{answer} ×{count}" for answer, count in Counter(map(str, value)).most_common()
        )
    text = "" if value is None else str(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
