"""The sides of a comparison: the score files of one model, by benchmark; several files of one are its runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llava_integration.compare.retrieval import expand
from llm2clip_plugin.contracts import ContractError, ScoreFile
from llm2clip_plugin.outside.values import check_range


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
            number = int(value) if isinstance(value, bool) else value
            check_range(number, -1e12, 1e12, name=f"{key} of item {item['id']!r}", where=str(path))
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
