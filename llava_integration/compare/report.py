"""A comparison as text (terminal, Markdown) and as one HTML file.

The page fetches nothing: style, script, drawings and pictures are in it, and its content security policy allows no
request and no script but its own (by hash). The template escapes every text; the script inserts answers as text.
Pictures are below ``--image-folder``, or in the folder that was scored, if its annotations are still those that were
scored: a score file from elsewhere must not bring another picture of this machine into a page that is passed on.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_integration.benchmarks.benchmark import Item, find_image
from llava_integration.benchmarks.rules import benchmarks
from llava_integration.compare.comparison import Comparison, Row, Side
from llm2clip_plugin.console import page_style, render, thumbnail
from llm2clip_plugin.contracts import sha256_text

HERE = Path(__file__).parent
SIDES = 6  # colors of page.css, base first
FULL_MME = 20.0  # points of MME perception that are one percent of its 2000
WIDTH = 240  # of a drawing

# Text

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

    def score(value: float, spread: float) -> str:
        return number(value, row.unit) + (f" ±{number(spread, row.unit)}" if spread else "")

    return (
        row.title if row.unit == "%" else f"{row.title} ({row.unit})",
        score(result.base, result.spread_base),
        score(result.new, result.spread_new),
        number(result.difference, row.unit, signed=True),
        f"[{number(result.low, row.unit, signed=True)}, {number(result.high, row.unit, signed=True)}]",
        p_value(result.p),
        p_value(row.p_holm),
        str(row.wins),
        str(row.losses),
        row.verdict,
    )


def method_lines(comparison: Comparison) -> list[str]:
    """The statistical methods, in sentences."""
    settings = comparison.settings
    lines = [
        f"Intervals: {settings['level']:.0%}, paired bootstrap over images ({settings['resamples']} resamples, seed "
        f"{settings['seed']}), composite scores resampled as composites. p: permutation over images, two-sided; Holm "
        "over all rows."
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


def text(comparison: Comparison, *, markdown: bool = False) -> str:
    """The tables and notes: for a terminal, or as Markdown for a README or an issue."""
    say, table, start, end = (escape_markdown, _markdown_table, "- ", ".") if markdown else (str, aligned, "  ", "")
    lines = ["# Comparison", ""] if markdown else []
    lines += [f"{'- **Warning**' if markdown else 'warning'}: {say(warning)}{end}" for warning in comparison.warnings]
    for new, base, rows in comparison.pairs():
        lines += ["", f"{'## ' if markdown else ''}{say(new)} (new) against {say(base)} (base)", ""]
        lines += [*table(HEADER, [cells(row) for row in rows]), ""]
        lines += [f"{start}{say(f'{row.title}: {row.power_line()}')}{end}" for row in rows]
        lines += [f"{start}{say(f'{row.title}: note: {note}')}{end}" for row in rows for note in row.notes]
    if comparison.references:
        lines += ["", f"Published, not measured here ({NOTE}):", "", *table(*_published(comparison))]
    lines += ["", *(f"{start}{say(f'note: {note}')}{end}" for note in comparison.notes), ""]
    return "\n".join([*lines, *method_lines(comparison)]).lstrip() + "\n" * markdown


def _published(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """A header, and a row for each model with published numbers."""
    names = [name for name in comparison.titles if any(name in values for values in comparison.references.values())]
    rows = [
        [model, *(f"{values[name]:g}" if name in values else "" for name in names)]
        for model, values in comparison.references.items()
    ]
    return ["", *(comparison.titles[name] for name in names)], rows


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in [header, *rows]]
    return [lines[0], "|---" + "|---:" * (len(header) - 1) + "|", *lines[1:]]


def escape_markdown(text: str) -> str:
    """Text without Markdown's markup and column separators."""
    for letter in "\\`*_{}[]<>|#":
        text = text.replace(letter, "\\" + letter)
    return text.replace("\n", " ")


# The page


def page(
    comparison: Comparison, sides: Sequence[Side], *, images: Path | None, with_images: bool, questions: int
) -> str:
    """The page's HTML.

    ``images``: folder of evaluation folders, or of one benchmark; ``questions``: disagreements per benchmark and pair
    of sides, wins and losses evenly.
    """
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pictures = Pictures(picture_folders(sides, images) if with_images else {})
    rows = [row for row in comparison.rows if row.base == comparison.names[0]]
    shown = [question for row in rows for question in disagreements(row, sides, pictures, questions)]
    fix = "were not found; pass their folder with --image-folder"
    unseen = [f"{count} pictures of {name} {fix}" for name, count in sorted(pictures.missing.items())]
    return render(
        HERE / "page.html",
        comparison=comparison,
        title=f"{' · '.join(comparison.names[1:])} against {comparison.names[0]}",
        policy="default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        style=page_style() + (HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        verdicts=[(f"{new} against {base}", _verdict(rows)) for new, base, rows in comparison.pairs()],
        notes=[*_notes(comparison), *unseen],
        data={"names": comparison.names, "questions": shown, "images": pictures.encoded},
        positions=lambda row: positions(row, comparison.rows),
        width=WIDTH,
        header=HEADER,
        cells=cells,
        number=number,
        published=NOTE,
        color=color,
    )


def _verdict(rows: Sequence[Row]) -> str:
    """One sentence for a pair of sides."""
    groups = {verdict: [row for row in rows if row.verdict == verdict] for verdict in ("better", "worse")}
    parts = [
        f"{verdict} on "
        + ", ".join(f"{row.title} ({number(row.result.difference, row.unit, signed=True)})" for row in group)
        for verdict, group in groups.items()
        if group
    ]
    rest = len(rows) - sum(map(len, groups.values()))
    return "; ".join([*parts, *([f"no difference shown on {rest} of {len(rows)}"] if rest else [])])


def _notes(comparison: Comparison) -> list[str]:
    """Methods, and the notes of every row."""
    lines = [*method_lines(comparison), *comparison.notes]
    if any(max(row.runs) > 1 for row in comparison.rows):
        lines.append("With several runs, the browser shows the answers of the first.")
    for row in comparison.rows:
        name = f"{row.title}, {row.new} against {row.base}" if len(comparison.names) > 2 else row.title
        lines += [f"{name}: {note}" for note in (row.power_line(), *row.notes)]
    return lines


def color(place: int) -> str:
    """A side's color; page.css defines it for light and dark."""
    return f"var(--side-{place % SIDES})"


def _ends(row: Row) -> tuple[float, float, float]:
    """Low end, estimate and high end of a row's difference, in percent."""
    size = FULL_MME if row.unit == "points" else 1.0
    return row.result.low / size, row.result.difference / size, row.result.high / size


def positions(row: Row, rows: Sequence[Row]) -> list[float]:
    """Where zero and a row's low end, estimate and high end are in a drawing on the scale of all ``rows``."""
    every = [value for one in rows for value in _ends(one)]
    low, high = min(*every, 0.0), max(*every, 0.0)
    span = (high - low) or 1.0
    return [round(8 + (value - low) / span * (WIDTH - 16), 1) for value in (0.0, *_ends(row))]


@dataclass
class Pictures:
    """Data URIs by key; questions about one picture share it."""

    folders: dict[str, list[Path]]  # of each benchmark; of one that is not in it, pictures are left out
    encoded: dict[str, str] = field(default_factory=dict)
    missing: Counter[str] = field(default_factory=Counter)

    def key(self, name: str, item: Item) -> str:
        """The key of an item's picture, "" if there is none; encodes it at first use."""
        key = f"{name}/{item.get('image')}"
        if key not in self.encoded and item.get("image") and name in self.folders:
            rule, image = benchmarks().get(name), str(item["image"])
            found = (
                rule.image_bytes(folder, item) if rule else find_image(("", "images"), folder, image)
                for folder in self.folders[name]
            )
            if encoded := thumbnail(next(filter(None, found), None)):
                self.encoded[key] = encoded
            else:
                self.missing[name] += 1
        return key if key in self.encoded else ""


def picture_folders(sides: Sequence[Side], root: Path | None) -> dict[str, list[Path]]:
    """Where each benchmark's pictures are searched: below ``root`` (--image-folder), else in the data that were scored.

    Raises FileNotFoundError if ``root`` is no folder.
    """
    if root is not None and not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root} for --image-folder; pass LLaVA's playground/data/eval or one of its folders"
        )
    folders: dict[str, list[Path]] = {}
    for name, run in [(name, run) for side in sides for name, runs in side.runs.items() for run in runs]:
        rule, data, digest = benchmarks().get(name), run.provenance.get("data"), run.provenance.get("data_sha256")
        known = folders.setdefault(name, [])
        if root is not None:
            known[:] = [root / below for below in (*(rule.folders if rule else ()), "") if (root / below).is_dir()]
        # the digest of a folder without annotations is that of nothing, and says nothing
        elif rule and data and digest != sha256_text("") and (data := Path(str(data))).exists():
            known += [data] if rule.data_digest(data) == digest else []
    return folders


LONGEST = 600  # characters of a question or an answer that are shown


def disagreements(row: Row, sides: Sequence[Side], pictures: Pictures, most: int) -> list[dict[str, Any]]:
    """At most so many questions of a row whose scores differ: wins and losses evenly, spread over the benchmark.

    Items without an answer, such as the queries of retrieval, are left out.
    """
    number = next(number for number, side in enumerate(sides) if side.name == row.new)
    base_run, new_run = sides[0].runs[row.benchmark][0], sides[number].runs[row.benchmark][0]
    new_items = dict(zip(new_run.ids, new_run.items, strict=True))
    pairs = [
        (base, new_items[key])
        for key, base in zip(base_run.ids, base_run.items, strict=True)
        if key in new_items
        and "answer" in base
        and "answer" in new_items[key]
        and (base.get("is_multimodal", True) or new_items[key].get("is_multimodal", True))  # ScienceQA-IMG
    ]
    won = [place for place, (base, new) in enumerate(pairs) if new["score"] > base["score"]]
    lost = [place for place, (base, new) in enumerate(pairs) if new["score"] < base["score"]]
    losses = min(len(lost), max(most // 2, most - len(won)))
    chosen = sorted([*spread(lost, losses), *spread(won, most - losses)])  # in the benchmark's order
    return [_question(row, number, *pairs[place], pictures) for place in chosen]


def spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many values, at even distances."""
    if len(values) <= most:
        return list(values)
    return [values[number * len(values) // most] for number in range(most)] if most > 0 else []


def _question(row: Row, number: int, base: Item, new: Item, pictures: Pictures) -> dict[str, Any]:
    """One entry of the page's data; ``number`` is the new side's."""
    return {
        "benchmark": row.title,
        "pair": number,
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
    }


def _rotations(item: Item) -> str:
    """MMBench's answers to every rotation of the options."""
    rows = item.get("rows") or []
    texts = [f"{_short(str(entry.get('text', '')))} ({'right' if entry.get('correct') else 'wrong'})" for entry in rows]
    return "; ".join(texts) if len(rows) > 1 else ""


def _truth(value: Any) -> str:
    """The truth in one line: human answers with their counts."""
    if isinstance(value, list):
        counts = {str(answer): value.count(answer) for answer in value}
        return ", ".join(f"{answer} ×{count}" for answer, count in sorted(counts.items(), key=lambda entry: -entry[1]))
    return _short("" if value is None else str(value))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
