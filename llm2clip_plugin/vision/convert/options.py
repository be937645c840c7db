"""The options of ``llm2clip import``."""

from llm2clip_plugin.options import Parser


def parser() -> Parser:
    """The command line."""
    made = Parser(
        "import",
        "llm2clip import openai/clip-vit-large-patch14-336 --output towers/clip-l14-336",
        "Convert a vision checkpoint into a tower directory.",
    )
    made.add_argument(
        "source", metavar="SOURCE", help="directory, Hub id, timm:NAME, or file (.safetensors, .pt, .pth, .bin)"
    )
    made.add_argument("--output", metavar="DIR", required=True, help="tower directory to write")
    made.add_argument(
        "--config", metavar="FILE", help="config.json for a source without one; its fields override an existing one's"
    )
    made.add_argument("--image-size", type=int, help="interpolate the positions to this size in pixels")
    made.add_argument("--overwrite", action="store_true", help="replace an existing directory")
    return made
