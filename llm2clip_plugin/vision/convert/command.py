"""``llm2clip import SOURCE --output DIR``."""

from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.convert.options import COMMAND
from llm2clip_plugin.vision.model_card import summary


def main(argv: list[str]) -> int:
    """Import a checkpoint, print what was matched and what was ignored."""
    options = COMMAND.parse(argv)
    card, report = import_tower(
        options.source, options.output, config=options.config, image_size=options.image_size, replace=options.overwrite
    )
    print("\n".join([*report, summary(options.output, card)]))
    return 0
