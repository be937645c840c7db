"""Our own score files, of ``llm2clip score``, ``bench-mllm`` and ``evaluate``.

Those of ``evaluate`` become one for each recall: in each direction, overall and by part. Their items are queries with
``side`` (i2t, t2i), ``part`` ("all", "long:en" ...) and a hit for each k (``r1`` ...); SugarCrepe's are pairs of
captions without a side, whose ``part`` is one of seven groups. XM3600's languages have each their own candidates.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llava_integration.compare.readers import OWN, Log, Reader
from llm2clip_plugin.contracts import ScoreFile

PARTS = "mean of categories"
OVERALL = "all"  # the part with every caption
DIRECTIONS = {"i2t": "image→text", "t2i": "text→image"}
MOST_PARTS = 8  # more would dominate the table, and Holm's correction costs every row power


def fits(path: Path) -> bool:
    """It is named as a score file, or is JSON of this kind."""
    if path.name.endswith(".scores.json"):
        return True
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(head, dict) and head.get("kind") == ScoreFile.KIND


def read(path: Path) -> Iterator[Log]:
    """One for each part, direction and k if the items are queries; else the file itself."""
    record = Log(**vars(ScoreFile.read(path)))
    name, items = record.benchmark.removeprefix("retrieval:"), record.items
    grouped = [{**item, "category": item.get("part")} for item in items]
    if record.benchmark == "retrieval:sugarcrepe":
        yield replace(record, benchmark=name, items=grouped, aggregate=PARTS)
        return
    if not items or any("side" not in item or "r1" not in item for item in items):
        yield record
        return
    parts = {str(item.get("part", OVERALL)): [] for item in items}
    for item in items:
        parts[str(item.get("part", OVERALL))].append(item)
    if record.benchmark == "retrieval:xm3600":
        record = replace(record, aggregate=PARTS)
        parts = {OVERALL: [item for item in grouped if item["category"] not in (None, OVERALL)] or grouped}
    elif len(parts) > MOST_PARTS + 1:
        record = replace(record, notes=[*record.notes, f"{len(parts)} parts: only the overall number is compared"])
        parts = {part: parts[part] for part in ([OVERALL] if OVERALL in parts else list(parts)[:MOST_PARTS])}
    for part, queries in parts.items():
        title = name if part == OVERALL else f"{name} {part}"
        for side, arrow in DIRECTIONS.items():
            chosen = [item for item in queries if item["side"] == side]
            for k in ("r1", "r10") if part == OVERALL else ("r1",):
                if chosen and all(k in item for item in chosen):
                    hits = [{**item, "score": item[k]} for item in chosen]
                    yield replace(record, benchmark=f"{title} {arrow} R@{k[1:]}", items=hits)


READER = Reader(name=OWN, endings=(".json",), fits=fits, read=read)
