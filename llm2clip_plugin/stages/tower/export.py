"""``llm2clip export``: a training run as a tower directory, or a tower directory in another format.

Tower directories need nothing beyond LLaVA's environment; a run is read by what trained it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llm2clip_plugin.contracts import RunRecord, TowerCard
from llm2clip_plugin.vision.convert.formats import FORMATS, convert, push_to_hub
from llm2clip_plugin.vision.export import reexport
from llm2clip_plugin.vision.model_card import summary

FORMAT_HELP = (
    "tower: a tower directory (the default); clip: transformers' CLIPVisionModelWithProjection; openclip: OpenCLIP's "
    "names (CLIP, SigLIP) or EVA-CLIP's (EVA02) with the LLM's adapter, for their image towers and `llm2clip import`, "
    "not for OpenCLIP's create_model, which wants a text tower; onnx: ONNX Runtime"
)


def main(argv: list[str]) -> int:
    """``llm2clip export SOURCE --output DIR [--format clip|openclip|onnx] [--push OWNER/NAME]``."""
    options = read_arguments(argv)
    is_run = (Path(options.source) / RunRecord.FILE).is_file()
    if options.format != "tower":
        if is_run or options.push:
            raise ValueError(
                f"--format {options.format} converts a tower directory and is not pushed: export the run as a tower "
                "first, then that"
            )
        print(f"{convert(options.source, options.output, options.format, replace=options.overwrite)}: read back equal")
        return 0
    if is_run:
        from llm2clip_plugin.stages.tower.run import export_run

        export_run(
            Path(options.source),
            Path(options.output),
            checkpoint=options.checkpoint,
            averaged=options.ema,
            replace=options.overwrite,
        )
        card = TowerCard.read(Path(options.output) / TowerCard.FILE)
    elif options.ema or options.checkpoint:
        raise ValueError(f"--ema and --checkpoint choose from a run; {options.source} has no {RunRecord.FILE}")
    else:
        card = reexport(options.source, options.output, replace=options.overwrite)
    print(summary(options.output, card))
    if options.push:
        print(push_to_hub(options.output, options.push, private=not options.public))
    return 0


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; exits with status 2 for a misspelt option."""
    parser = argparse.ArgumentParser(
        prog="llm2clip export", description="Write a run as a tower directory, or a tower directory in another format."
    )
    parser.add_argument("source", help="folder of a training run, tower directory, or Hub id")
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument("--format", default="tower", choices=["tower", *FORMATS], help=FORMAT_HELP)
    parser.add_argument("--checkpoint", default="", help="a run's checkpoint other than the newest")
    parser.add_argument("--ema", action="store_true", help="a run's moving averages instead of its weights")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the written tower directory to the Hub, too")
    parser.add_argument("--public", action="store_true", help="the uploaded repository is public")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing directory")
    return parser.parse_args(argv)
