"""A comparison as one HTML file.

The page fetches nothing: style, script, drawings and pictures are in it, and its content security
policy allows no request and no script but its own (by hash). The template escapes every text; the
script inserts answers as text. Pictures are below ``--image-folder``, or in the folder that was
scored, if its annotations are still those that were scored: a score file from elsewhere must not
bring another picture of this machine into a page that is passed on.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_integration.evaluator.benchmarks.benchmark import Item, find_image
from llava_integration.evaluator.benchmarks.rules import benchmarks
from llava_integration.evaluator.compare.comparison import Comparison, Row
from llava_integration.evaluator.compare.pairing import paired_runs
from llava_integration.evaluator.compare.report import (
    HEADER,
    NOTE,
    PARTS_HEADER,
    cells,
    method_lines,
    number,
    part_cells,
    row_lines,
)
from llava_integration.evaluator.compare.sides import Run, Side, with_common_task
from llm2clip_plugin.hashes import sha256_text
from llm2clip_plugin.pages import page_style, render, thumbnail

HERE = Path(__file__).parent
FULL_MME = 20.0  # points of MME perception that are one percent of its 2000
MOST_NAMED = 8  # benchmarks with one verdict that the page's first lines name
LONGEST = 600  # characters of a question or an answer that are shown
POLICY = (  # a page's content security policy, but for its own script
    "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
    "style-src 'unsafe-inline'; "
)


def page(
    comparison: Comparison,
    sides: Sequence[Side],
    *,
    images: Path | None = None,
    questions: int = 80,
) -> str:
    """The page's HTML. ``images``: folder of evaluation folders, or of one benchmark;
    ``questions``: disagreements per benchmark and pair of sides, wins and losses evenly."""
    sides = with_common_task(sides)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    encoded: dict[str, str | None] = {}
    to_browse = browser_questions(comparison, sides, images, questions, encoded)
    notes = [*method_lines(comparison), *comparison.notes]
    for new, base, rows in comparison.pairs():
        pair = f"{new} against {base}: " if len(sides) > 2 else ""
        notes += [f"{pair}{line}" for line in row_lines(rows)]
    if any(max(row.runs) > 1 for row in comparison.rows):
        notes.append("With several runs, the browser shows the answers of the first.")
    return render(
        HERE / "page.html",
        comparison=comparison,
        title=f"{' · '.join(comparison.names[1:])} against {comparison.names[0]}",
        policy=f"{POLICY}script-src 'sha256-{digest}'",
        style=page_style() + (HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        notes=notes,
        missing=sum(uri is None for uri in encoded.values()),
        data={"names": comparison.names, "questions": to_browse, "images": encoded},
        drawn=drawn_intervals(comparison.rows),
        header=HEADER,
        most_named=MOST_NAMED,
        cells=cells,
        parts_header=PARTS_HEADER,
        part_cells=part_cells,
        number=number,
        published=NOTE,
    )


def browser_questions(
    comparison: Comparison,
    sides: Sequence[Side],
    images: Path | None,
    questions: int,
    encoded: dict[str, str | None],
) -> list[dict[str, Any]]:
    """The disagreements with the base that the page's browser shows, in their first runs;
    ``encoded`` gets their pictures."""
    listed = []
    for row in comparison.rows:
        if row.base != comparison.names[0]:
            continue
        side = comparison.names.index(row.new)
        base_runs, new_runs, _ = paired_runs(
            row.benchmark, sides[0], sides[side], min_overlap=0
        )
        folders = picture_folders(row.benchmark, [base_runs[0], new_runs[0]], images)
        for base, new in disagreements(
            base_runs[0].items, new_runs[0].items, questions
        ):
            about = {
                "benchmark": row.title,
                "pair": side,
                "image": picture_key(row.benchmark, base, folders, encoded),
            }
            listed.append({**about, **_question(base, new)})
    return listed


def drawn_intervals(rows: Sequence[Row]) -> list[list[float]]:
    """Zero and each row's low end, estimate and high end, as fractions of a drawing's width, all on
    one scale."""
    marks = []
    for row in rows:
        size = FULL_MME if row.unit == "points" else 1.0
        low, high = row.interval
        marks.append([0.0, low / size, row.result.difference / size, high / size])
    low = min(map(min, marks))
    high = max(map(max, marks))
    width = (high - low) or 1
    drawn = []
    for row_marks in marks:
        drawn.append([(mark - low) / width for mark in row_marks])
    return drawn


def picture_folders(name: str, runs: Sequence[Run], root: Path | None) -> list[Path]:
    """Where a benchmark's pictures are searched: below ``root`` (--image-folder), else in the data
    that were scored."""
    rule = benchmarks().get(name)
    if root is not None:
        below = rule.folders if rule else ()
        return [root / folder for folder in (*below, "")]
    if rule is None:
        return []
    scored = {
        (str(run.provenance.get("data")), run.provenance.get("data_sha256"))
        for run in runs
    }
    unchanged = []
    for data, digest in sorted(scored, key=str):
        folder = Path(data)
        # the digest of a folder without annotations is that of nothing, and says nothing
        if digest == sha256_text("") or not folder.exists():
            continue
        if rule.data_digest(folder) == digest:
            unchanged.append(folder)
    return unchanged


def picture_key(
    name: str, item: Item, folders: Sequence[Path], encoded: dict[str, str | None]
) -> str:
    """The key of an item's picture, "" if there is none; ``encoded`` gets its data URI, None if it
    is not found."""
    rule = benchmarks().get(name)
    image = str(item.get("image") or "")
    key = f"{name}/{image}"
    if image and key not in encoded:
        encoded[key] = None
        for folder in folders:
            if rule:
                picture = rule.image_bytes(folder, item)
            else:
                picture = find_image(("", "images"), folder, image)
            if picture:
                encoded[key] = thumbnail(picture)
                break
    return key if encoded.get(key) else ""


def disagreements(
    base: Sequence[Item], new: Sequence[Item], most: int
) -> list[tuple[Item, Item]]:
    """At most so many questions whose scores differ: wins and losses evenly, spread over the
    benchmark, in its order. Items without an answer, such as the queries of retrieval, are left
    out."""
    pairs = []
    for old, now in zip(base, new, strict=True):
        answered = "answer" in old and "answer" in now
        # ScienceQA-IMG
        multimodal = old.get("is_multimodal", True) or now.get("is_multimodal", True)
        if answered and multimodal:
            pairs.append((old, now))
    won = []
    lost = []
    for index, (old, now) in enumerate(pairs):
        if now["score"] > old["score"]:
            won.append(index)
        elif now["score"] < old["score"]:
            lost.append(index)
    losses = min(len(lost), max(most // 2, most - len(won)))
    wins = min(len(won), most - losses)
    chosen = [*spread_evenly(lost, losses), *spread_evenly(won, wins)]
    return [pairs[index] for index in sorted(chosen)]


def spread_evenly(numbers: Sequence[int], count: int) -> list[int]:
    """``count`` of them at equal steps."""
    return [numbers[step * len(numbers) // count] for step in range(count)]


def _question(base: Item, new: Item) -> dict[str, Any]:
    """What the page's browser shows of a question."""
    both = (base, new)
    return {
        "id": str(base["id"]),
        "question": _short(base.get("question")),
        "choices": [_short(choice) for choice in _list_in(base, "choices")],
        "truth": _short(base.get("truth")),
        "category": str(base.get("category") or ""),
        "answers": [_short(item.get("answer")) for item in both],
        "missing": [bool(item.get("missing")) for item in both],
        "scores": [round(float(item["score"]), 3) for item in both],
        "rotations": [_rotations(item) for item in both],
    }


def _rotations(item: Item) -> str:
    """MMBench's answers to every rotation of the options."""
    texts = []
    for entry in _list_in(item, "rows"):
        if isinstance(entry, dict):
            verdict = "right" if entry.get("correct") else "wrong"
            texts.append(f"{_short(entry.get('text'))} ({verdict})")
    return "; ".join(texts) if len(texts) > 1 else ""


def _list_in(item: Item, name: str) -> list[Any]:
    """The list in a field of an item; empty if there is none."""
    value = item.get(name)
    return value if isinstance(value, list) else []


def _short(value: Any) -> str:
    """A text in one line of the page; of human answers each with its count."""
    if isinstance(value, list):
        answers = Counter(map(str, value)).most_common()
        value = ", ".join(f"{answer} ×{count}" for answer, count in answers)
    text = "" if value is None else str(value)
    if len(text) > LONGEST:
        return f"{text[:LONGEST]} …"
    return text
