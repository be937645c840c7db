"""``llm2clip data split DATA --output DIR``: hold out a part of a data set, the same one wherever it is run."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from llm2clip_plugin.commands import command
from llm2clip_plugin.contracts import ContractError, canonical_json, sha256_text
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import check_fields, open_source
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.data.split.options import COMMAND, SplitConfig
from llm2clip_plugin.data.split.sides import Sides, decide
from llm2clip_plugin.data.split.writing import SIDES, clear_marks, outputs, write_sides, write_summary

SUMMARY = "split.json"  # in the output: settings and counts


def main(argv: list[str]) -> int:
    """Print the counts and write the split; exit status 0."""
    config = COMMAND.parse(argv)
    print("\n".join(split_data(config)), flush=True)
    return 0


def split_data(config: SplitConfig) -> list[str]:
    """Split ``config.path`` and return the report.

    The output appears when it is complete; what a killed call left in a hidden folder next to it is used by the same
    call again. Raises FileExistsError if the output is there and not of this split, ValueError for a sample without
    the field, a side without samples or a source that cannot be split, OSError for too little space.
    """
    output = Path(config.output)
    source = open_source(config)
    check_fields(source)
    settings = _settings(config, source)
    if os.path.isdir(source.path) and output.resolve().is_relative_to(Path(source.path).resolve()):
        raise ValueError(
            f"--output {output} is inside the data at {source.path}, whose subfolders are read too: validation would "
            "be trained on; choose a folder elsewhere"
        )
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        return [*_already(output, settings), *_how_to_read(source, output)]
    sides = decide(source, config.validation, config.by, config.workers)
    lines = _report(source, sides, config)
    if config.dry_run:
        return lines
    partial = output.with_name(f".{output.name}.partial")
    _begin(partial, settings)
    write_sides(source, sides, partial, config.workers)
    _verify(config, source, sides, partial)
    clear_marks(partial)
    write_summary(partial / SUMMARY, settings | {"samples": sides.samples, "captions": sides.captions})
    if output.is_dir():
        output.rmdir()  # it is empty
    os.replace(partial, output)
    return [*lines, *_how_to_read(source, output)]


def _settings(config: SplitConfig, source: Source) -> dict[str, object]:
    """What makes it the same split: the data and how its sides are decided."""
    shards, sizes = [(shard.name, shard.size) for shard in source.shards], [size for size, *_ in source.stamps]
    data = sha256_text(canonical_json([shards, sizes, config.key_field, config.image_field]))
    return {"data": source.path, "data_sha256": data, "validation": config.validation, "by": config.by}


def _same(path: Path, settings: dict[str, object]) -> bool:
    try:
        saved = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
        return all(saved.get(name) == settings[name] for name in ("data_sha256", "validation", "by"))
    except (OSError, ValueError, AttributeError):
        return False


def _already(output: Path, settings: dict[str, object]) -> list[str]:
    if not _same(output, settings):
        raise FileExistsError(
            f"{output} exists and is not this split of {settings['data']}; choose another --output, or delete it"
        )
    return [f"{output} is complete already"]


def _begin(partial: Path, settings: dict[str, object]) -> None:
    """Make the hidden folder, or go on in one of the same split."""
    if partial.exists() and any(partial.iterdir()) and not _same(partial, settings):
        raise FileExistsError(
            f"{partial} holds an unfinished split of other data or settings; rerun that command, or delete it"
        )
    partial.mkdir(parents=True, exist_ok=True)
    write_summary(partial / SUMMARY, settings)


def _verify(config: SplitConfig, source: Source, sides: Sides, folder: Path) -> None:
    """Open both sides and compare their numbers of samples."""
    for side, path in outputs(source, folder).items():
        written = open_source(_reading(config, source, path))
        if len(written) != sides.samples[side]:
            raise ContractError(
                f"{path} has {len(written)} samples, expected {sides.samples[side]}: the data changed while it was "
                f"read, or the disk is damaged; delete {folder} and rerun"
            )


def _reading(config: SplitConfig, source: Source, path: Path) -> SourceConfig:
    fields = {item.name for item in dataclasses.fields(SourceConfig)}
    values = {name: value for name, value in vars(config).items() if name in fields}
    return SourceConfig(**{**values, "path": str(path), "images": _images(source)})


def _images(source: Source) -> str:
    return source.images_folder if isinstance(source, RowSource) else ""


def _report(source: Source, sides: Sides, config: SplitConfig) -> list[str]:
    total, lines = sum(sides.samples.values()), []
    for side in SIDES:
        share = f" ({100 * sides.samples[side] / total:.2f} %)" if side == "validation" else ""
        groups = f", {sides.groups[side]:,} values of {config.by!r}" if config.by else ""
        lines.append(f"{side}: {sides.samples[side]:,} samples{share}, {sides.captions[side]:,} captions{groups}")
    if not config.by and sum(sides.groups.values()) < total:
        repeated = total - sum(sides.groups.values())
        lines.append(f"note: {repeated:,} samples share their key with another sample and are on the same side")
    if sides.shared:
        examples = [source.captions(owner) for owner in sides.shared_owners]
        shown = "; ".join(f"{key}: {captions[0].text[:60]!r}" for key, captions in examples)
        lines.append(
            f"warning: {sides.shared:,} of the {sides.captions['validation']:,} validation captions also occur in "
            f"training (compared without case and punctuation), in samples such as {shown}. To keep "
            "samples that share a field on one side, add --by FIELD"
        )
    return lines


def _how_to_read(source: Source, output: Path) -> list[str]:
    """The paths, and the images' folder where these are not copied."""
    paths = outputs(source, output)
    images = ("--image-folder", _images(source)) if _images(source) else ()
    return [command("embed", path, *images, "--llm", "LLM") for path in paths.values()] + [
        command("train-tower", paths["train"], "--validation", paths["validation"], *images, "--tower", "TOWER")
    ]
