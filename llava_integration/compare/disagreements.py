"""The questions whose score differs between two sides, as the page's browser shows them."""

from collections.abc import Sequence
from typing import Any

from llava_integration.benchmarks.base import Item
from llava_integration.compare.comparison import Row
from llava_integration.compare.pictures import Pictures
from llava_integration.compare.sides import Side

LONGEST = 600  # characters of a question or an answer that are shown


def disagreements(row: Row, sides: Sequence[Side], pictures: Pictures, most: int) -> list[dict[str, Any]]:
    """At most so many questions of a row whose scores differ: wins and losses evenly, spread over the benchmark.

    Items without an answer, such as the queries of retrieval, are left out.
    """
    number = next(number for number, side in enumerate(sides) if side.name == row.new)
    base_items, new_items = (
        {str(item["id"]): item for item in side.runs[row.benchmark][0].items} for side in (sides[0], sides[number])
    )
    pairs = [
        (base_items[key], new_items[key])
        for key in base_items
        if key in new_items
        and "answer" in base_items[key]
        and "answer" in new_items[key]
        and counts_for_headline(base_items[key], new_items[key])
    ]
    won = [place for place, (base, new) in enumerate(pairs) if new["score"] > base["score"]]
    lost = [place for place, (base, new) in enumerate(pairs) if new["score"] < base["score"]]
    losses = min(len(lost), max(most // 2, most - len(won)))
    chosen = sorted([*spread(lost, losses), *spread(won, most - losses)])  # in the benchmark's order
    return [_question(row, number, *pairs[place], pictures, (len(won), len(lost))) for place in chosen]


def counts_for_headline(base: Item, new: Item) -> bool:
    """False for ScienceQA's questions without an image."""
    return bool(base.get("is_multimodal", True) or new.get("is_multimodal", True))


def spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many values, at even distances."""
    if len(values) <= most:
        return list(values)
    return [values[number * len(values) // most] for number in range(most)] if most > 0 else []


def _question(
    row: Row, number: int, base: Item, new: Item, pictures: Pictures, totals: tuple[int, int]
) -> dict[str, Any]:
    """One entry of the page's data; ``number`` is the new side's, ``totals`` are the row's wins and losses."""
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
        "of": totals,
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
