"""Open captioned images of any format."""

import os
from collections.abc import Iterator
from pathlib import Path

import llm2clip_plugin
from llm2clip_plugin.data.samples import DEFAULT_FIELDS, BrokenSample, Sample
from llm2clip_plugin.data.sources.base import Shard, Source, SourceConfig, format_help, formats
from llm2clip_plugin.data.sources.tars import instead_of_tars
from llm2clip_plugin.options import joined, nearest

__all__ = ["Shard", "Source", "SourceConfig", "check_fields", "detect_format", "open_source"]

EMOJI = Path(llm2clip_plugin.__file__).parent / "data" / "emoji"  # its tars are not part of a wheel
PROBES = 4096  # samples of a source, evenly spaced, in which a caption field must occur


def open_source(config: SourceConfig, broken_shards: dict[str, str] | None = None) -> Source:
    """The source of ``config``, indexed, and downloaded if it is at a URL.

    A broken shard is left out and noted in ``broken_shards`` (name -> reason); without it, it raises ValueError. Raises
    FileNotFoundError if there is no data, ValueError if the format cannot be determined.
    """
    if EMOJI in Path(config.path).parents and not any(EMOJI.glob("*.tar")):
        raise FileNotFoundError(f"{config.path}: the built-in emoji are in the repository, not in an installed package")
    name = config.format if config.format != "auto" else detect_format(config.path)
    return formats()[name].open(config, broken_shards)


def detect_format(path: str) -> str:
    """Name of the format that recognizes a path. Raises FileNotFoundError or ValueError if none does."""
    for known in sorted(formats().values(), key=lambda known: known.fallback):
        if known.recognizes(path):
            return known.name
    if not os.path.exists(path):
        raise FileNotFoundError(f"no data at {path}")
    instead = instead_of_tars(path) or f"; choose one with --format ({format_help()})"
    raise ValueError(f"cannot determine the format of {path}{instead}")


def check_fields(*sources: Source, needed: bool = False) -> None:
    """Raise ValueError for a field of ``--fields`` that no sample of the sources has; the default's may be missing.

    ``needed``: also if no sample has a caption. Stops at the sample that shows what is looked for, mostly the first.
    """
    fields = sources[0].config.fields if sources else ()
    missing = {} if fields == DEFAULT_FIELDS else {field.partition("=")[0]: field for field in fields}
    known, broken, captions = set[str](), None, not needed
    where = ", ".join(source.path for source in sources)
    for record in (record for source in sources for record in _probe(source)):
        if captions and not missing:
            return
        if isinstance(record, BrokenSample):
            broken = broken or record
            continue
        known |= record.values.keys()
        filled = {name for name, value in record.values.items() if value}
        missing = {name: field for name, field in missing.items() if name not in filled}
        captions = captions or any(field.name in filled for field in sources[0].fields)
    if missing or not captions:
        if broken is not None and not known:
            raise ValueError(f"{where}: no sample can be read; the first: {broken}")
        name, field = next(iter(missing.items()), ("", ""))
        what = (
            f"field {name!r} (--fields {field})"
            if name
            else f"caption in {', '.join(f.name for f in sources[0].fields)}"
        )
        problem = f"no sample of {where} has a {what}{nearest(name, known) if name else ''}"
        raise ValueError(joined(problem, f"known: {', '.join(sorted(known)[:20])}; choose with --fields NAME=KIND"))


def _probe(source: Source) -> Iterator[Sample | BrokenSample]:
    for number in range(0, len(source), len(source) // PROBES + 1):
        try:
            yield source.record(number)
        except BrokenSample as error:
            yield error
