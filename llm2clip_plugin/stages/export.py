"""``llm2clip export``: a training run as a tower directory, or one in another format.
``export-llm``."""

import dataclasses
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import RunRecord, TowerCard
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.folders import MODEL_FOLDER, output_folder
from llm2clip_plugin.stages.embedder import export_dual, export_text
from llm2clip_plugin.stages.tower_export import export_run
from llm2clip_plugin.text.adapter import adapter_sha256
from llm2clip_plugin.text.config import EXPORT_LLM, EncoderConfig, ExportConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.merged import write_merged
from llm2clip_plugin.vision.convert import EXPORT
from llm2clip_plugin.vision.convert.formats import convert
from llm2clip_plugin.vision.directory import fetch_directory, located
from llm2clip_plugin.vision.export import (
    check_repository,
    push_to_hub,
    reexport,
    summary,
)


def main(argv: list[str]) -> int:
    """``llm2clip export SOURCE --output DIR [--format clip|onnx] [--push OWNER/NAME]``."""
    options = EXPORT.parse(argv)
    check_repository(options.push)
    source = Path(options.source)
    output = Path(options.output)
    replace = options.overwrite
    adapter = None
    is_run = (source / RunRecord.FILE).is_file()
    if options.format != "tower":
        if is_run or options.push:
            raise ValueError(
                f"--format {options.format} converts a tower directory, a run's is RUN/tower; "
                "leave out --push"
            )
        if options.format == "sentence-transformers":
            converted = export_dual(
                options.source,
                output,
                llm=options.llm,
                adapter=options.adapter,
                trust_remote_code=options.trust_remote_code,
                merge=options.merge,
                replace=replace,
            )
        else:
            converted = convert(options.source, output, options.format, replace=replace)
        print(f"{converted}: verified by reloading")
        return 0
    if is_run:
        teacher = RunRecord.read(source / RunRecord.FILE).teacher
        adapter = teacher_adapter(teacher) if options.with_adapter else None
        export_run(
            source,
            output,
            options.checkpoint,
            options.ema,
            adapter=adapter,
            replace=replace,
        )
    elif options.ema or options.checkpoint:
        raise ValueError(
            f"--ema and --checkpoint require a training run, but {source} has no {RunRecord.FILE}"
        )
    else:
        if options.with_adapter:
            directory = fetch_directory(options.source)
            card = TowerCard.read(directory / TowerCard.FILE)
            adapter = teacher_adapter(located(card, directory).teacher)
        reexport(options.source, output, adapter=adapter, replace=replace)
    print(summary(output, TowerCard.read(output / TowerCard.FILE)))
    if options.push:
        print(push_to_hub(output, options.push, private=not options.public))
    return 0


def teacher_adapter(teacher: dict[str, Any]) -> Path:
    """The folder of a teacher's adapter, downloaded if it is on the Hub.

    Raises ValueError if the teacher has none, FileNotFoundError if it is gone, ContractError if it
    was changed.
    """
    if not teacher.get("adapter_sha256"):
        raise ValueError(
            f"--with-adapter: the teacher {teacher.get('llm', '')!r} has no adapter; "
            "leave the option out"
        )
    folder = fetch_directory(str(teacher.get("adapter", "")))
    actual = adapter_sha256(folder)
    expected = teacher["adapter_sha256"]
    if actual != expected:
        raise ContractError(
            f"--with-adapter: {folder} has SHA-256 {actual[:12]}, but the tower was trained with "
            f"{expected[:12]}; restore that adapter there"
        )
    return folder


# ``llm2clip export-llm``: a fine-tuned LLM as a folder of its own.

# compared before and after
SAMPLE_CAPTIONS = ["a red bicycle leans against a wall", "two dogs", "猫が眠っている"]
TOLERANCE = 1e-4  # of an embedding's norm: the same float32 weights, summed in another order once


def main_llm(argv: list[str]) -> int:
    print(f"wrote {export_llm(EXPORT_LLM.parse(argv))}; verified by reloading")
    return 0


def export_llm(config: ExportConfig) -> Path:
    """Write merged weights, tokenizer and card, reload and compare embeddings before the folder is
    moved to its place.

    Raises ValueError for 4-bit weights, ContractError if the reloaded embeddings differ.
    """
    if config.encoder.load_in_4bit:
        raise ValueError(
            "an adapter cannot be merged into 4-bit weights; omit --load-in-4bit"
        )
    encoder = CaptionEncoder(
        dataclasses.replace(config.encoder, compute_dtype="float32"), "cpu"
    )
    if config.format == "sentence-transformers":
        return export_text(encoder, config.output, replace=config.overwrite)
    with output_folder(
        config.output, MODEL_FOLDER, replace=config.overwrite
    ) as temporary:
        write_merged(encoder, temporary)
        trusted = config.encoder.trust_remote_code
        exported = EncoderConfig(
            llm=str(temporary), compute_dtype="float32", trust_remote_code=trusted
        )
        reloaded = CaptionEncoder(exported, "cpu")
        before_NW, after_NW = (
            each.encode(SAMPLE_CAPTIONS) for each in (encoder, reloaded)
        )
        worst = float(
            ((before_NW - after_NW).norm(dim=1) / before_NW.norm(dim=1)).max()
        )
        if not worst < TOLERANCE:
            raise ContractError(
                f"{config.output}: reloaded embeddings differ by {worst:.2g} of their norm"
            )
    return Path(config.output)
