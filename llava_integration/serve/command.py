"""``llm2clip llava export``: LLaVA checkpoints as Hugging Face models."""

from pathlib import Path

from llm2clip_plugin.options.parser import Parser
from llm2clip_plugin.paths import checked

FORMATS = ("hf",)
PRECISIONS = ("fp16", "bf16", "fp32", "keep")
GIB = 1 << 30


def main(argv: list[str]) -> int:
    """Convert a LLaVA 1.5 checkpoint into a Hugging Face model that vLLM and other servers open."""
    parser = Parser(
        "llava export",
        "llm2clip llava export checkpoints/llava-7b --format hf --output hf/llava-7b",
        (main.__doc__ or "")
        + "\nWhere LLaVA is installed, the result is compared with LLaVA's own code before it gets its name.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a full, LoRA or projector checkpoint")
    add("--output", required=True, type=Path, help="folder to write")
    add("--format", default="hf", choices=FORMATS, help="hf: LlavaForConditionalGeneration, safetensors")
    add("--dtype", default="fp16", choices=PRECISIONS, help="of the weights; LLaVA loads fp16; keep: as they are")
    add("--model-base", type=Path, help="base model of a LoRA or projector checkpoint (default: the one recorded)")
    add("--tower", default="", help="path, registered name or Hub id of the tower, if the checkpoint cannot find it")
    add("--conv-mode", default="", help="conversation template, for checkpoints that do not record it (vicuna_v1)")
    add("--no-compare", action="store_true", help="do not compare with LLaVA's code (two models in fp32, one by one)")
    add("--push", metavar="OWNER/NAME", help="upload the folder to this repository of the Hub")
    add("--public", action="store_true", help="a new repository of --push is public")
    add("--overwrite", action="store_true", help="replace an existing folder")
    options = checked(parser, argv)
    from llava_integration.serve import parity
    from llava_integration.serve.export import Export, export
    from llm2clip_plugin.vision.push import check_repository, upload

    check_repository(options.push)
    made = Export.of(
        options.checkpoint,
        base=options.model_base,
        tower=options.tower,
        conv_mode=options.conv_mode,
        dtype=options.dtype,
    )
    compares = not options.no_compare and parity.has_llava()

    def verify(directory: Path) -> None:
        print(f"compared with LLaVA's own code: {parity.compare(made, directory)}", flush=True)

    print(f"{options.checkpoint}: {made.describe()}", flush=True)
    size = export(made, options.output, overwrite=options.overwrite, verify=verify if compares else None)
    reason = "" if compares or options.no_compare else ": LLaVA is not installed in this environment"
    dtype = "" if options.dtype == "keep" else f"{options.dtype} "
    print(f"{options.output}: {size / GIB:.2f} GiB of {dtype}weights, every tensor verified by reloading", end="")
    print("" if compares else f"; not compared with LLaVA's own code{reason}")
    if options.push:
        print(upload(options.output, options.push, f"LLaVA 1.5, {made.describe()}", private=not options.public))
    return 0
