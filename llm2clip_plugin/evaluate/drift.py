"""``llm2clip evaluate drift``: what a tower kept, lost and gained in training."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.evaluate.command_line import NOTES_SHOWN, dataset_name, on_all_ranks, provenance, wide_console
from llm2clip_plugin.evaluate.drift_compare import Drift, compare
from llm2clip_plugin.evaluate.drift_page import drift_page
from llm2clip_plugin.evaluate.drift_sides import TEXT_SIDE, Side, measure_side, open_labeled, open_side
from llm2clip_plugin.evaluate.labeled_images import open_labeled_images
from llm2clip_plugin.evaluate.options.drift import COMMAND, DriftConfig

CLASSES_PRINTED = 10  # that lost most; the page and the JSON have all


def main(argv: list[str]) -> int:
    """``llm2clip evaluate drift BEFORE AFTER``."""
    config = COMMAND.parse(argv)
    return on_all_ranks(lambda all_ranks: measure(config, all_ranks=all_ranks), lambda drift: report(config, drift))


def measure(config: DriftConfig, *, all_ranks: bool = False) -> Drift:
    """Measure both sides on the same images and compare them item by item.

    Raises FileNotFoundError, ContractError or ValueError for what the user can correct.
    """
    labeled = None
    if config.data:
        test = open_labeled_images(config.data, config.label, config.cluster)
        train = open_labeled_images(config.train, config.label, config.cluster) if config.train else None
        labeled = open_labeled(config, test, train)
    before = open_side(config.before, config)
    after = open_side(config.after, config)
    zero_shot, notes = _zero_shot(config, before, after)
    sides = []
    for side in (before, after):
        sides.append(measure_side(side, config, labeled, zero_shot=zero_shot, all_ranks=all_ranks))
    return compare(
        sides[0],
        sides[1],
        labeled,
        resamples=config.resamples,
        texts=(before.text, after.text),
        hashes=(before.weights_sha256, after.weights_sha256),
        notes=notes,
    )


def _zero_shot(config: DriftConfig, *sides: Side) -> tuple[bool, list[str]]:
    """Whether both sides have text for zero-shot, and what to say if not. Raises ValueError if nothing remains."""
    without = [side.path for side in sides if side.read is None]
    if not without:
        return True, []
    lacking = f"{' and '.join(without)} {'has' if len(without) == 1 else 'have'} no text side"
    if config.captions or not config.train:
        more = "" if config.captions else ", or measure features alone with --train LABELED_IMAGES"
        raise ValueError(f"{lacking}: {TEXT_SIDE}{more}")
    return False, [f"no zero-shot accuracy: {lacking}; {TEXT_SIDE}"]


def report(config: DriftConfig, drift: Drift) -> None:
    """Print the tables, and write the page and the JSON."""
    console = wide_console()
    console.print(changes_table(config, drift))
    if any(one.after < one.before for one in drift.classes):
        console.print(classes_table(drift))
    for name, value in drift.cka:
        console.print(f"CKA {name:16} {value:6.3f}")
    for note in drift.notes[:NOTES_SHOWN]:
        console.print(note, markup=False, soft_wrap=True)
    page = Path(config.output)
    with atomic_file(page) as temporary:
        temporary.write_text(drift_page(config, drift), encoding="utf-8")
    with atomic_file(page.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(as_json(config, drift), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {page} and {page.with_suffix('.json')}")


def changes_table(config: DriftConfig, drift: Drift) -> Table:
    """Every measure in percent, with the interval of the difference."""
    table = Table(
        title=f"{dataset_name(config.before)} -> {dataset_name(config.after)}",
        caption="percent; \\[95 % interval] of the paired difference, bootstrap over clusters; kept: right in both",
    )
    table.add_column("measure")
    for name in ("before", "after", "difference", "kept", "lost", "gained", "neither"):
        table.add_column(name, justify="right")
    for one in drift.changes:
        low, high = (f"{100 * value:+.1f}" for value in (one.difference.low, one.difference.high))
        table.add_row(
            one.measure,
            f"{100 * one.before:.1f}",
            f"{100 * one.after:.1f}",
            f"{100 * one.difference.mean:+.1f} \\[{low}, {high}]",
            *map(str, (one.kept, one.lost, one.gained, one.neither)),
        )
    return table


def classes_table(drift: Drift) -> Table:
    """The classes that lost most."""
    table = Table(title="classes that lost most", caption="images that are right; the page and the JSON have all")
    table.add_column("class")
    for name in ("images", "before", "after", "lost", "gained"):
        table.add_column(name, justify="right")
    losing = [one for one in drift.classes if one.after < one.before]
    for one in losing[:CLASSES_PRINTED]:
        table.add_row(one.name, *map(str, (one.images, one.before, one.after, one.lost, one.gained)))
    return table


def as_json(config: DriftConfig, drift: Drift) -> dict[str, Any]:
    """Every number of the page, and every image that changed sides."""
    changes = []
    for one in drift.changes:
        interval = {name: getattr(one.difference, name) for name in ("mean", "low", "high", "level", "clusters")}
        fields = ("measure", "before", "after", "kept", "lost", "gained", "neither")
        changes.append({name: getattr(one, name) for name in fields} | {"difference": interval})
    return {
        "before": config.before,
        "after": config.after,
        "data": config.data,
        "captions": config.captions,
        "changes": changes,
        "classes": [dataclasses.asdict(one) for one in drift.classes],
        "cka": dict(drift.cka),
        "changed": [dataclasses.asdict(one) for one in drift.changed],
        "notes": drift.notes,
        "provenance": provenance(weights_sha256=list(drift.hashes), text=list(drift.texts)),
    }
