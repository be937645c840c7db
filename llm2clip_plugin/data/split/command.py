"""``llm2clip data split DATA --output DIR``: hold out a part of a data set, the same one wherever it is run."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from llm2clip_plugin.commands import command
from llm2clip_plugin.contracts import ContractError, atomic_file, canonical_json, sha256_text
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import check_fields, open_source
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.data.split.options import COMMAND, SplitConfig
from llm2clip_plugin.data.split.sides import Sides, decide
from llm2clip_plugin.data.split.writing import SIDES, outputs, write_sides

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
    the field, a side without samples or a source that cannot be split.
    """
    output, source = Path(config.output), open_source(config)
    check_fields(source)
    if os.path.isdir(source.path) and output.resolve().is_relative_to(Path(source.path).resolve()):
        raise ValueError(
            f"--output {output} is inside the data at {source.path}, whose subfolders are read too: validation would "
            "be trained on; choose a folder elsewhere"
        )
    partial, settings = output.with_name(f".{output.name}.partial"), _settings(config, source)
    for folder in (output, partial):
        if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]) and not _same(folder, settings):
            raise FileExistsError(
                f"{folder} exists and is not this split of {config.path}; choose another --output, or delete it"
            )
    if (output / SUMMARY).exists():
        return [f"{output} is complete already", *_how_to_read(source, output)]
    sides = decide(source, config.validation, config.by, config.workers)
    lines = _report(source, sides, config)
    if config.dry_run:
        return lines
    partial.mkdir(parents=True, exist_ok=True)
    _write_summary(partial, settings)
    write_sides(source, sides, partial, config.workers)
    _verify(config, source, sides, partial)
    _write_summary(partial, settings | {"samples": sides.samples, "captions": sides.captions})
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


def _write_summary(folder: Path, body: dict[str, object]) -> None:
    with atomic_file(folder / SUMMARY) as temporary:
        temporary.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(SourceConfig)}
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
