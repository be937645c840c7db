"""``llm2clip export``: a training run as a tower directory, or a tower directory in another format."""

from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import RunRecord, TowerCard
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.stages.tower_export import export_run
from llm2clip_plugin.text.adapter import adapter_sha256
from llm2clip_plugin.vision.convert import EXPORT
from llm2clip_plugin.vision.convert.importing import convert
from llm2clip_plugin.vision.directory import fetch_directory, located
from llm2clip_plugin.vision.export import check_repository, push_to_hub, reexport, summary


def main(argv: list[str]) -> int:
    """``llm2clip export SOURCE --output DIR [--format clip|onnx] [--push OWNER/NAME]``."""
    options = EXPORT.parse(argv)
    check_repository(options.push)
    source, output, replace, adapter = Path(options.source), Path(options.output), options.overwrite, None
    is_run = (source / RunRecord.FILE).is_file()
    if options.format != "tower":
        if is_run or options.push:
            told = f"--format {options.format} converts a tower directory, a run's is RUN/tower"
            raise ValueError(f"{told}; leave out --push")
        print(f"{convert(options.source, output, options.format, replace=replace)}: verified by reloading")
        return 0
    if is_run:
        teacher = RunRecord.read(source / RunRecord.FILE).teacher
        adapter = teacher_adapter(teacher) if options.with_adapter else None
        export_run(source, output, options.checkpoint, options.ema, adapter=adapter, replace=replace)
    elif options.ema or options.checkpoint:
        raise ValueError(f"--ema and --checkpoint require a training run, but {source} has no {RunRecord.FILE}")
    else:
        if options.with_adapter:
            directory = fetch_directory(options.source)
            adapter = teacher_adapter(located(TowerCard.read(directory / TowerCard.FILE), directory).teacher)
        reexport(options.source, output, adapter=adapter, replace=replace)
    print(summary(output, TowerCard.read(output / TowerCard.FILE)))
    if options.push:
        print(push_to_hub(output, options.push, private=not options.public))
    return 0


def teacher_adapter(teacher: dict[str, Any]) -> Path:
    """The folder of a teacher's adapter, downloaded if it is on the Hub.

    Raises ValueError if the teacher has none, FileNotFoundError if it is gone, ContractError if it was changed.
    """
    if not teacher.get("adapter_sha256"):
        raise ValueError(f"--with-adapter: the teacher {teacher.get('llm', '')!r} has no adapter; leave the option out")
    folder = fetch_directory(str(teacher.get("adapter", "")))
    if (actual := adapter_sha256(folder)) != teacher["adapter_sha256"]:
        both = f"SHA-256 {actual[:12]}, but the tower was trained with {teacher['adapter_sha256'][:12]}"
        raise ContractError(f"--with-adapter: {folder} has {both}; restore that adapter there")
    return folder
