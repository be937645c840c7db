"""``python -m llava_integration.evaluate``: a LLaVA model answers a question file (``answer.command``)."""

import sys

from llava_integration.answer.command import main

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
