"""LLaVA checkpoints as Hugging Face models that servers open; here ``llm2clip llava export``."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from llm2clip_plugin.options import Command

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class LlavaExportConfig:
    """A LLaVA checkpoint to export."""

    checkpoint: Path  # folder of a full, LoRA or projector checkpoint
    output: Path  # folder to write
    format: Literal["hf"] = "hf"  # hf: LlavaForConditionalGeneration, safetensors
    dtype: Literal["fp16", "bf16", "fp32", "keep"] = "fp16"  # of the weights; LLaVA loads fp16; keep: as they are
    model_base: Path | None = None  # base model of a LoRA or projector checkpoint; none: the one recorded
    tower: str = ""  # path, registered name or Hub id of the tower, if the checkpoint cannot find it
    conv_mode: str = ""  # conversation template, for checkpoints that do not record it (vicuna_v1)
    compare: bool = True  # compare the result with LLaVA's code (two models in fp32, one by one)
    push: str | None = None  # OWNER/NAME: upload the folder to this repository of the Hub
    public: bool = False  # a new repository of --push is public
    overwrite: bool = False  # replace an existing folder


COMMAND = Command(
    name="llava export",
    example="llm2clip llava export checkpoints/llava-7b --format hf --output hf/llava-7b",
    about="Convert a LLaVA 1.5 checkpoint into a Hugging Face model that vLLM and other servers open. Where LLaVA is "
    "installed, the result is compared with LLaVA's own code before it gets its name.",
    settings=LlavaExportConfig,
    arguments="checkpoint",
)


def main(argv: list[str]) -> int:
    """Convert a LLaVA 1.5 checkpoint into a Hugging Face model."""
    options = COMMAND.parse(argv)
    from llava_integration.serve.export import Export, export
    from llm2clip_plugin.vision.export import check_repository, upload

    check_repository(options.push)
    choices = {"base": options.model_base, "tower": options.tower, "conv_mode": options.conv_mode}
    made = Export.of(options.checkpoint, dtype=options.dtype, **choices)
    compares = options.compare and find_spec("llava") is not None
    print(f"{options.checkpoint}: {made.describe()}", flush=True)
    size = export(made, options.output, overwrite=options.overwrite, compares=compares)
    reason = "" if compares or not options.compare else ": LLaVA is not installed in this environment"
    dtype = "" if options.dtype == "keep" else f"{options.dtype} "
    print(f"{options.output}: {size / GIB:.2f} GiB of {dtype}weights, every tensor verified by reloading", end="")
    print("" if compares else f"; not compared with LLaVA's own code{reason}")
    if options.push:
        print(upload(options.output, options.push, f"LLaVA 1.5, {made.describe()}", private=not options.public))
    return 0
