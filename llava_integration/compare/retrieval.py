"""Score files of ``llm2clip evaluate`` as rows of a comparison: recall in each direction, overall and by part.

Their items are queries with ``side`` (i2t, t2i), ``part`` ("all", "long:en" ...) and a hit for each k (``r1`` ...);
SugarCrepe's are pairs of captions without a side, whose ``part`` is one of seven groups with equal weight. XM3600's
number is the mean over its languages, each with its own candidates.
"""

from collections.abc import Sequence
from dataclasses import replace

from llava_integration.benchmarks.base import Item
from llm2clip_plugin.contracts import ScoreFile

OVERALL = "all"  # the part with every caption
DIRECTIONS = {"i2t": "image→text", "t2i": "text→image"}
MOST_PARTS = 8  # more would dominate the table, and Holm's correction costs every row power


def expand(record: ScoreFile) -> list[ScoreFile]:
    """One record for each part, direction and k if the items are queries in both directions; else the record itself."""
    if record.benchmark == "retrieval:sugarcrepe":
        return [replace(record, benchmark="sugarcrepe", items=[_equal(item) for item in record.items])]
    if not record.items or any("side" not in item or "r1" not in item for item in record.items):
        return [record]
    if record.benchmark == "retrieval:xm3600":
        items = [_equal(item) for item in record.items if item.get("part", OVERALL) != OVERALL]
        return _rows(record, "xm3600", items or record.items, ("r1", "r10"))
    parts = list(dict.fromkeys(str(item.get("part", OVERALL)) for item in record.items))
    if len(parts) > MOST_PARTS + 1:
        record = replace(record, notes=[*record.notes, f"{len(parts)} parts: only the overall number is compared"])
        parts = [part for part in parts if part == OVERALL] or parts[:MOST_PARTS]
    name, records = record.benchmark.removeprefix("retrieval:"), []
    for part in parts:
        items = [item for item in record.items if item.get("part", OVERALL) == part]
        overall = part == OVERALL
        records += _rows(record, name if overall else f"{name} {part}", items, ("r1", "r10") if overall else ("r1",))
    return records


def _rows(record: ScoreFile, name: str, items: Sequence[Item], ks: Sequence[str]) -> list[ScoreFile]:
    """One record per direction and k."""
    records = []
    for side, arrow in DIRECTIONS.items():
        chosen = [item for item in items if item["side"] == side]
        for k in ks:
            if chosen and all(k in item for item in chosen):
                hits = [{**item, "score": item[k]} for item in chosen]
                records.append(replace(record, benchmark=f"{name} {arrow} R@{k[1:]}", items=hits))
    return records


def _equal(item: Item) -> Item:
    """An item of a benchmark whose number is the mean over its parts."""
    return {**item, "category": item["part"], "equal_parts": item["part"]}
