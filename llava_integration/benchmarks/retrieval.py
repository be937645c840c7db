"""Score files of ``llm2clip evaluate`` as rows of a comparison: recall of either direction, whole and by part.

Their items are queries with ``side`` (i2t, t2i), ``part`` ("all", "long:en" ...) and a hit for each k (``r1`` ...).
"""

from __future__ import annotations

from dataclasses import replace

from llm2clip_plugin.contracts import ScoreFile

WHOLE = "all"  # the part that holds every caption
DIRECTIONS = {"i2t": "image→text", "t2i": "text→image"}
MOST_PARTS = 8  # more (36 languages) would drown the rest, and cost every row power


def expand(record: ScoreFile) -> list[ScoreFile]:
    """The record itself, or one record a part, direction and k where its items are queries of both directions."""
    if not record.items or any("side" not in item or "r1" not in item for item in record.items):
        return [record]
    parts = list(dict.fromkeys(str(item.get("part", WHOLE)) for item in record.items))
    if len(parts) > MOST_PARTS + 1:
        record = replace(record, notes=[*record.notes, f"only the whole of {len(parts)} parts is compared"])
        parts = [part for part in parts if part == WHOLE] or parts[:MOST_PARTS]
    name = record.benchmark.removeprefix("retrieval:")
    records = []
    for part in parts:
        for side, arrow in DIRECTIONS.items():
            items = [item for item in record.items if item["side"] == side and item.get("part", WHOLE) == part]
            for k in ("r1", "r10") if part == WHOLE else ("r1",):
                if items and all(k in item for item in items):
                    title = f"{name} {arrow} R@{k[1:]}" if part == WHOLE else f"{name} {part} {arrow} R@{k[1:]}"
                    hits = [{**item, "score": item[k]} for item in items]
                    records.append(replace(record, benchmark=title, items=hits))
    return records
