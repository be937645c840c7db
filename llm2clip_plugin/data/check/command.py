"""``llm2clip data check DATA``: read a data set once, decode every image, and report statistics and broken samples."""

import dataclasses
import json
from typing import Any

from llm2clip_plugin.data.check.options import COMMAND
from llm2clip_plugin.data.check.reading import CheckConfig, Reading, load_counter, read_all
from llm2clip_plugin.data.check.report import as_text, build_report, overlap
from llm2clip_plugin.data.sources.open import Source, check_fields, open_source
from llm2clip_plugin.progress import progress_bar


def main(argv: list[str]) -> int:
    """Exit status 1 if training on this data would stop, else 0."""
    config = COMMAND.parse(argv)
    report = check_data(config)
    print(json.dumps(report, indent=2, ensure_ascii=False) if config.json else as_text(report, config.show))
    return 0 if report["fit_for_training"] else 1


def check_data(config: CheckConfig) -> dict[str, Any]:
    """Read all of ``config.path`` and return the report that ``--json`` prints.

    Raises FileNotFoundError if there is no data, ValueError for an unknown format or a tokenizer that can't be loaded.
    """
    load_counter(config.tokenizer)  # fail here, not in a worker
    broken_shards: dict[str, str] = {}
    source = open_source(config, broken_shards)
    check_fields(source)
    report = build_report(config, source, broken_shards, reading := _read(source, config))
    if config.validation:
        other = open_source(dataclasses.replace(config, path=config.validation), {})
        report["validation"] = overlap(other, reading, _read(other, config))
    return report


def _read(source: Source, config: CheckConfig) -> Reading:
    reading = Reading()
    with progress_bar(total=len(source), label="data check", unit="samples") as bar:
        for part in read_all(source, config):
            reading.add(part)
            bar.update(part.samples)
    return reading
