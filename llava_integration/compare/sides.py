"""The sides of a comparison: the score files of one model, by benchmark; several files of one are its runs.

Score files of ``llm2clip evaluate`` become rows: recall in each direction, overall and by part. Their items are queries
with ``side`` (i2t, t2i), ``part`` ("all", "long:en" ...) and a hit for each k (``r1`` ...); SugarCrepe's are pairs of
captions without a side, whose ``part`` is one of seven groups with equal weight. XM3600's number is the mean over its
languages, each with its own candidates.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llava_integration.benchmarks.benchmark import Item
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.files import ContractError

OVERALL = "all"  # the part with every caption
DIRECTIONS = {"i2t": "image→text", "t2i": "text→image"}
MOST_PARTS = 8  # more would dominate the table, and Holm's correction costs every row power


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model: its name and the runs of each benchmark."""

    name: str
    path: Path
    runs: dict[str, tuple[ScoreFile, ...]]
    notes: tuple[str, ...] = ()


def load_side(path: Path, name: str = "") -> Side:
    """Read a score file, or every score file below a folder; files of one benchmark are its runs (seeds).

    Raises FileNotFoundError, or ContractError for a score file that can't be compared.
    """
    if path.is_dir():
        records = [(file, ScoreFile.read(file)) for file in sorted(path.rglob("*.json")) if _is_score_file(file)]
        if not records:
            raise FileNotFoundError(
                f"{path} has no score files; `llm2clip score BENCHMARK DATA --answers FILE --output FILE` writes them"
            )
    elif path.is_file():
        records = [(path, ScoreFile.read(path))]
    else:
        raise FileNotFoundError(f"no score file or folder {path}")
    runs: dict[str, list[ScoreFile]] = {}
    notes = []
    for file, record in records:
        _check(file, record)
        for part in expand(record):
            earlier = runs.setdefault(part.benchmark, [])
            if any(part.items == other.items for other in earlier):
                notes.append(f"{file} duplicates another file of {part.benchmark}: not counted as another run")
            else:
                earlier.append(part)
    models = {record.model for _, record in records}
    default = path.name if path.is_dir() else models.copy().pop() or path.stem
    return Side(
        name=name or default, path=path, runs={key: tuple(value) for key, value in runs.items()}, notes=tuple(notes)
    )


def _is_score_file(path: Path) -> bool:
    """Whether a JSON file is a score file; others below a folder are ignored."""
    if path.name.endswith(".scores.json"):
        return True
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(head, dict) and head.get("kind") == ScoreFile.KIND


def _check(path: Path, record: ScoreFile) -> None:
    """ContractError if a score file's items can't be compared."""
    if not record.items:
        raise ContractError(f"{path} has no items; a comparison needs one item per question")
    for number, item in enumerate(record.items):
        if "id" not in item or "score" not in item:
            raise ContractError(f"{path}: item {number} has the fields {sorted(item)}; every item needs id and score")
        if not isinstance(item["id"], (str, int)):
            raise ContractError(f"{path}: item {number} has the id {item['id']!r}, expected a text or a whole number")
        numbers = {key: value for key, value in item.items() if isinstance(value, float)}
        for key, value in {**numbers, "score": item["score"]}.items():
            if not isinstance(value, (int, float)) or not abs(value) <= 1e12:
                raise ContractError(f"{path}: {key} of item {item['id']!r} is {value!r}, expected a finite number")
    names = [str(item["id"]) for item in record.items]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ContractError(f"{path} has item {twice} twice; score the answers again")


def load_sides(paths: Sequence[Path], names: Sequence[str]) -> list[Side]:
    """Read all sides; equal names get the parent folder's name or a number."""
    if names and len(names) != len(paths):
        raise ValueError(f"{len(names)} --names for {len(paths)} sides; pass one name per side, base first")
    sides = [load_side(path, names[place] if names else "") for place, path in enumerate(paths)]
    for rename in (
        lambda place, side: f"{side.path.resolve().parent.name}/{side.path.stem}",
        lambda place, side: f"{side.name} #{place}",
    ):
        shown = [side.name for side in sides]
        sides = [
            replace(side, name=rename(place, side)) if shown.count(side.name) > 1 else side
            for place, side in enumerate(sides)
        ]
    return sides


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
