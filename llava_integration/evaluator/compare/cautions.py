"""What makes the numbers of a comparison meaningless, whatever the statistics say."""

from collections.abc import Iterator, Sequence
from typing import Any

from llava_integration.evaluator.compare.sides import Side

EMPTY = 0.1  # fraction of empty answers above which a score is not the model's
# how a side answered; another value may move the scores by itself
ANSWER_SETTINGS = (
    "precision",
    "dtype",
    "load_8bit",
    "load_4bit",
    "conv_mode",
    "temperature",
    "num_beams",
)


def recorded_settings(side: Side) -> list[dict[str, Any]]:
    """The provenance of each of a side's runs, and the settings of its answers."""
    recorded = []
    for runs in side.runs.values():
        for run in runs:
            recorded.append(run.provenance)
            answer_settings = run.provenance.get("answer_settings")
            if isinstance(answer_settings, dict):
                recorded.append(answer_settings)
    return recorded


def warnings(sides: Sequence[Side]) -> Iterator[str]:
    """Empty answers that are more than EMPTY of a side's, and sides that answered in different
    precisions or ways."""
    for side in sides:
        for runs in side.runs.values():
            empty = sum(run.counts.get("empty", 0) for run in runs)
            total = sum(run.counts.get("answered", 0) for run in runs)
            if empty > EMPTY * total:
                yield f"{empty} of the {total} answers of {side.name} to {runs[0].title} are empty"
    recorded = {side.name: recorded_settings(side) for side in sides}
    for setting in ANSWER_SETTINGS:
        used: dict[str, str] = {}
        for name, records in recorded.items():
            values = {str(record[setting]) for record in records if setting in record}
            used[name] = "/".join(sorted(values))
        if len({*used.values()} - {""}) > 1:
            listed = ", ".join(
                f"{name}: {value}" for name, value in used.items() if value
            )
            yield f"the sides differ in their {setting}, which alone may move scores: {listed}"
