"""Two measured sides of ``llm2clip evaluate drift``, compared item by item."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm2clip_plugin.bootstrap import Interval, bootstrap_mean
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.evaluate.drift_sides import Labeled, Measured
from llm2clip_plugin.evaluate.similarity import linear_cka, partners

Items = Mapping[str, Mapping[str, Any]]  # by id


@dataclass(frozen=True, kw_only=True)
class Change:
    """One measure of both sides on the same items; fractions 0 to 1."""

    measure: str  # zero-shot, kNN, linear, image to text, text to image
    before: float
    after: float
    difference: Interval  # of after - before, clustered and paired
    kept: int  # items that are right in both
    lost: int
    gained: int
    neither: int
    scores: dict[str, tuple[float, float]]  # item -> before, after


@dataclass(frozen=True, kw_only=True)
class ClassChange:
    """The images of one class, in the first measure of classification."""

    name: str
    images: int
    before: int  # right
    after: int
    kept: int
    lost: int
    gained: int


@dataclass(frozen=True, kw_only=True)
class ChangedImage:
    """An image that only one side classifies right."""

    key: str
    truth: str
    before: str  # predicted class
    after: str
    gained: bool


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Everything that the page and the JSON show."""

    changes: list[Change]
    classes: list[ClassChange]  # those that lost most first
    changed: list[ChangedImage]
    cka: list[tuple[str, float]]  # layer of BEFORE, similarity to the same depth of AFTER
    texts: tuple[str, str]  # what reads captions on each side
    notes: list[str]
    hashes: tuple[str, str]
    labeled: Labeled | None


def compare(
    before: Measured,
    after: Measured,
    labeled: Labeled | None,
    *,
    resamples: int = 2000,
    texts: tuple[str, str] = ("", ""),
    hashes: tuple[str, str] = ("", ""),
    notes: Sequence[str] = (),
) -> Drift:
    """The differences of two sides, item by item."""
    changes = []
    for name, scores in before.scores.items():
        for measured, items in _parts(name, scores).items():
            others = _parts(name, after.scores[name])[measured]
            changes.append(change(measured, items, others, resamples=resamples))
    classes: list[ClassChange] = []
    changed: list[ChangedImage] = []
    classified = next((one for one in changes if one.measure in before.predicted), None)
    if labeled is not None and classified is not None:
        name_of = dict(zip(labeled.test.classes, labeled.names, strict=True))
        truth = {
            key: labeled.test.classes[label] for key, label in zip(labeled.test.keys, labeled.test.labels, strict=True)
        }
        classes = class_changes(classified, truth, name_of)
        one, other = (side.predicted[classified.measure] for side in (before, after))
        for key, (was, now) in classified.scores.items():
            if was != now:
                predicted = (name_of.get(side[key], side[key]) for side in (one, other))
                changed.append(
                    ChangedImage(key=key, truth=name_of[truth[key]], **_predicted(predicted), gained=now > was)
                )
    return Drift(
        changes=changes,
        classes=classes,
        changed=changed,
        cka=similarities(before, after),
        texts=texts,
        notes=[*notes, *dict.fromkeys([*before.notes, *after.notes])],
        hashes=hashes,
        labeled=labeled,
    )


def _predicted(names: Any) -> dict[str, str]:
    return dict(zip(("before", "after"), names, strict=True))


def _parts(name: str, scores: ScoreFile) -> dict[str, Items]:
    """Measure -> items by id; retrieval is two measures."""
    if name != "retrieval":
        return {name: {item["id"]: item for item in scores.items}}
    sides = {"image to text": "i2t", "text to image": "t2i"}
    return {
        measured: {item["id"]: item for item in scores.items if item["side"] == side}
        for measured, side in sides.items()
    }


def change(measured: str, before: Items, after: Items, *, resamples: int = 2000) -> Change:
    """One measure, over the items of both sides. Raises ValueError if they share none."""
    common = [key for key in before if key in after]
    if not common:
        raise ValueError(f"{measured}: the two towers were measured on no common item")
    pairs = {key: (float(before[key]["score"]), float(after[key]["score"])) for key in common}
    differences = [now - was for was, now in pairs.values()]
    clusters = [before[key]["cluster"] for key in common]
    return Change(
        measure=measured,
        before=sum(was for was, _ in pairs.values()) / len(pairs),
        after=sum(now for _, now in pairs.values()) / len(pairs),
        difference=bootstrap_mean(differences, clusters, resamples=resamples),
        scores=pairs,
        **_counts(pairs.values()),
    )


def _counts(pairs: Any) -> dict[str, int]:
    """Items that both sides have right, only the first, only the second, none; ties count for the better side."""
    counts = {"kept": 0, "lost": 0, "gained": 0, "neither": 0}
    for was, now in pairs:
        counts["lost" if now < was else "gained" if now > was else "kept" if was > 0 else "neither"] += 1
    return counts


def class_changes(of: Change, truth: Mapping[str, str], name_of: Mapping[str, str]) -> list[ClassChange]:
    """Every class, those with the largest loss first."""
    by_class: dict[str, list[tuple[float, float]]] = {}
    for key, pair in of.scores.items():
        by_class.setdefault(truth[key], []).append(pair)
    changes = []
    for name, pairs in by_class.items():
        counts = _counts(pairs)
        changes.append(
            ClassChange(
                name=name_of[name],
                images=len(pairs),
                before=counts["kept"] + counts["lost"],
                after=counts["kept"] + counts["gained"],
                kept=counts["kept"],
                lost=counts["lost"],
                gained=counts["gained"],
            )
        )
    return sorted(changes, key=lambda one: ((one.after - one.before) / one.images, one.name))


def similarities(before: Measured, after: Measured) -> list[tuple[str, float]]:
    """CKA of each state of BEFORE with the state of AFTER at the same depth, and of the image features."""
    if not before.layers:
        return []
    *ours, feature = before.layers
    theirs = list(after.layers)[:-1]
    place_of = partners(len(ours) - 1, len(theirs) - 1)
    pairs = [(name, theirs[place_of[number]]) for number, name in enumerate(ours)]
    return [
        (one if one == other else f"{one} and {other}", linear_cka(before.layers[one], after.layers[other]))
        for one, other in [*pairs, (feature, feature)]
    ]
