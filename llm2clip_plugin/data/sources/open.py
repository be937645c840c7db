"""Open captioned images of any format, and check that they have the captions that a run will read."""

import os
from collections.abc import Iterator, Mapping, Sequence

from llm2clip_plugin.data.samples import DEFAULT_FIELDS, BrokenSample, Sample
from llm2clip_plugin.data.sources.base import Shard, Source, SourceConfig, formats
from llm2clip_plugin.data.sources.tars import how_to_make_tars
from llm2clip_plugin.options import joined, nearest

__all__ = ["Shard", "Source", "SourceConfig", "check_fields", "check_kinds", "detect_format", "open_source"]

PROBES = 4096  # samples of a source, evenly spaced, in which a caption field must occur
KIND_PROBES = 64  # samples in which kinds of captions are looked for


def open_source(config: SourceConfig, broken_shards: dict[str, str] | None = None) -> Source:
    """The source of ``config``, indexed, and downloaded if it is at a URL.

    A broken shard is left out and noted in ``broken_shards`` (name -> reason); without it, it raises ValueError. Raises
    FileNotFoundError if there is no data, ValueError if the format cannot be determined.
    """
    name = config.format if config.format != "auto" else detect_format(config.path)
    return formats()[name].open(config, broken_shards)


def detect_format(path: str) -> str:
    """Name of the format that recognizes a path. Raises FileNotFoundError or ValueError if none does."""
    for known in sorted(formats().values(), key=lambda known: known.fallback):
        if known.recognizes(path):
            return known.name
    if not os.path.exists(path):
        raise FileNotFoundError(f"no data at {path}")
    known = "; ".join(f"{known.name}: {known.help}" for known in formats().values())
    raise ValueError(
        f"cannot determine the format of {path}; choose one with --format ({known}), or {how_to_make_tars(path)}"
    )


def check_fields(*sources: Source, needed: bool = False) -> None:
    """Raise ValueError for a field of ``--fields`` that no sample of the sources has; the default's may be missing.

    ``needed``: also if no sample has a caption. Stops at the sample that shows what is looked for, mostly the first.
    """
    fields = sources[0].config.fields if sources else ()
    missing = {} if fields == DEFAULT_FIELDS else {field.partition("=")[0]: field for field in fields}
    broken: list[BrokenSample] = []
    known, captions = set[str](), not needed
    if captions and not missing:
        return
    for sample in (sample for source in sources for sample in _probe(source, PROBES, broken)):
        known |= sample.values.keys()
        missing = {name: field for name, field in missing.items() if not sample.values.get(name)}
        captions = captions or bool(sample.captions)
        if captions and not missing:
            return
    where = ", ".join(source.path for source in sources)
    if broken and not known:
        raise ValueError(f"{where}: no sample can be read; the first: {broken[0]}")
    if missing:
        name, field = next(iter(missing.items()))
        problem = f"no sample of {where} has a field {name!r} (--fields {field}){nearest(name, known)}"
    else:
        problem = f"no sample of {where} has a caption in {', '.join(field.name for field in sources[0].fields)}"
    raise ValueError(joined(problem, f"known: {', '.join(sorted(known)[:20])}; choose with --fields NAME=KIND"))


def check_kinds(sources: Sequence[Source], weights: Mapping[str, float]) -> None:
    """Raise ValueError if ``weights`` names a kind that no source declares and none of its first captions has."""
    declared = {field.kind for source in sources for field in source.fields}
    samples = [sample for source in sources for sample in _probe(source, KIND_PROBES)] if weights else []
    known = declared | {caption.kind for sample in samples for caption in sample.captions}
    if unknown := sorted(set(weights) - known):
        raise ValueError(
            f"caption weights name the kinds {', '.join(unknown)}, which the data does not have; "
            f"known: {', '.join(sorted(known))}"
        )


def _probe(source: Source, count: int, broken: list[BrokenSample] | None = None) -> Iterator[Sample]:
    """About ``count`` evenly spaced samples; those that can't be read go to ``broken``."""
    for number in range(0, len(source), len(source) // count + 1):
        try:
            yield source[number]
        except BrokenSample as error:
            if broken is not None:
                broken.append(error)
