"""``llm2clip import SOURCE --output DIR``."""

from llm2clip_plugin.options.parser import Parser
from llm2clip_plugin.vision.convert.checkpoint_files import PICKLE_SUFFIXES
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.model_card import summary


def main(argv: list[str]) -> int:
    """Import a checkpoint, print what was matched and what was ignored."""
    parser = Parser(
        "import",
        "llm2clip import openai/clip-vit-large-patch14-336 --output towers/clip-l14-336",
        "Convert a vision checkpoint into a tower directory.",
    )
    parser.add_argument(
        "source", help=f"directory, Hub id, timm:NAME, or file (.safetensors, {', '.join(PICKLE_SUFFIXES)})"
    )
    parser.add_argument("--output", required=True, help="tower directory to write")
    parser.add_argument("--config", help="config.json for a source without one; its fields override an existing one's")
    parser.add_argument("--image-size", type=int, help="interpolate the positions to this size in pixels")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing directory")
    options = parser.parse_args(argv)
    card, report = import_tower(
        options.source, options.output, config=options.config, image_size=options.image_size, replace=options.overwrite
    )
    print("\n".join([*report, summary(options.output, card)]))
    return 0
