"""The options of ``llm2clip export``."""

from llm2clip_plugin.options.parser import Parser
from llm2clip_plugin.vision.convert.formats import format_helps


def parser() -> Parser:
    """The command line."""
    made = Parser(
        "export",
        "llm2clip export runs/l14-336 --output towers/l14-336",
        "Write a run as a tower directory, or a tower directory in another format.",
    )
    made.add_argument("source", metavar="SOURCE", help="folder of a training run, tower directory, or Hub id")
    made.add_argument("--output", metavar="DIR", required=True, help="directory to write")
    made.add_argument(
        "--format",
        default="tower",
        choices=["tower", *format_helps()],
        help="; ".join(
            ["tower: a tower directory (the default)", *(f"{name}: {text}" for name, text in format_helps().items())]
        ),
    )
    made.add_argument(
        "--with-adapter",
        action="store_true",
        help="copy the adapter of the teacher LLM into the directory, which then embeds texts with the base LLM alone",
    )
    made.add_argument("--checkpoint", default="", help="a run's checkpoint to export (default: the newest)")
    made.add_argument("--ema", action="store_true", help="export a run's moving average instead of its weights")
    made.add_argument("--push", metavar="OWNER/NAME", help="also upload the tower directory to the Hub")
    made.add_argument("--public", action="store_true", help="make the uploaded repository public")
    made.add_argument("--overwrite", action="store_true", help="replace an existing directory")
    return made
