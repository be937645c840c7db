"""What makes the numbers of a comparison meaningless, whatever the statistics say."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_integration.evaluator.compare.sides import Run, Side
from llm2clip_plugin.hashes import sha256_file

EMPTY = 0.1  # fraction of empty answers above which a score is not the model's
# how a side answered or was measured; another value may move the scores by itself
ANSWER_SETTINGS = (
    "precision",
    "dtype",
    "load_8bit",
    "load_4bit",
    "conv_mode",
    "temperature",
    "num_beams",
    "group",  # of retrieval
    "llm_fingerprint",  # of a forecast
    "select_layer",
    "prompts",  # of zero-shot classification
    "train",  # of probes
    "pool",
    "k",
)


def recorded_settings(side: Side) -> list[dict[str, Any]]:
    """The provenance of each of a side's runs, and the settings of its answers or of a
    measurement."""
    recorded = []
    for runs in side.runs.values():
        for run in runs:
            recorded.append(run.provenance)
            for name in ("answer_settings", "settings"):
                settings = run.provenance.get(name)
                if isinstance(settings, dict):
                    recorded.append(settings)
    return recorded


def benchmarks_by_weights(side: Side) -> list[list[str]]:
    """The benchmarks that each state of a side's checkpoint answered, by the sample of its weights;
    [] for a side with several runs, which are different models."""
    if any(len(runs) > 1 for runs in side.runs.values()):
        return []
    by_sample: dict[str, list[str]] = {}
    for (run,) in side.runs.values():
        answer_settings = run.provenance.get("answer_settings")
        if (
            isinstance(answer_settings, dict)
            and "model_sample_sha256" in answer_settings
        ):
            sample = str(answer_settings["model_sample_sha256"])
            by_sample.setdefault(sample, []).append(run.title)
    return list(by_sample.values())


def warnings(sides: Sequence[Side]) -> Iterator[str]:
    """Empty answers that are more than EMPTY of a side's, a side whose benchmarks were answered
    with different weights, and sides that answered in different precisions or ways."""
    for side in sides:
        by_weights = benchmarks_by_weights(side)
        if len(by_weights) > 1:
            listed = "; ".join(", ".join(titles) for titles in by_weights)
            yield (
                f"{side.name} answered with different weights under one name ({listed}): was the "
                "checkpoint trained again? Rerun bench-mllm --overwrite on all of them"
            )
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


def copy_notes(base: Side, new: Side, names: Sequence[str]) -> list[str]:
    """A note if both sides have the same files on some of these benchmarks: a path given twice, or
    copies. Two models of one table have no note."""
    copied = []
    for name in names:
        base_runs = base.runs[name]
        new_runs = new.runs[name]
        base_models = [run.model for run in base_runs]
        if base_models != [run.model for run in new_runs]:
            continue
        if are_copies(files_of(base_runs), files_of(new_runs)):
            copied.append(name)
    if not copied:
        return []
    return [
        f"{base.name} ({base.path}) and {new.name} ({new.path}) have the same files on "
        f"{', '.join(copied)}: nothing is compared there; was one given twice, or copied?"
    ]


def files_of(runs: Sequence[Run]) -> list[Path]:
    """The files that the runs were read from."""
    return [file for run in runs for file in run.files]


def are_copies(files: Sequence[Path], others: Sequence[Path]) -> bool:
    """Whether these files are those, or have the same bytes; False if there are none."""
    if not files or len(files) != len(others):
        return False
    for file, other in zip(files, others, strict=True):
        if file.resolve() == other.resolve():
            continue
        if not file.is_file() or not other.is_file():
            return False
        if file.stat().st_size != other.stat().st_size:
            return False
        if sha256_file(file) != sha256_file(other):
            return False
    return True
