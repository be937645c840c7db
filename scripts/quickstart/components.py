#!/usr/bin/env python3
"""Fit what the raw LLM's embeddings are read without: their mean, and the largest component of training captions.

    scripts/quickstart/components.py SHARD --llm DIR --attention causal --pooling last --layer 16 --folder DIR

One reading of those that ``llm2clip evaluate captions --search`` tries, and the same file; `llm2clip embed --post-file`
reads it.
"""

import argparse
import sys
from pathlib import Path

from llm2clip_plugin.contracts import atomic_directory
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder, first_captions, remove_components

CAPTIONS = 500  # distinct ones; their largest component hardly moves with more


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", help="training captions")
    parser.add_argument("--folder", type=Path, required=True, help="folder to write")
    for name in ("llm", "attention", "pooling", "chat-template", "compute-dtype"):
        parser.add_argument(f"--{name}", default=vars(EncoderConfig())[name.replace("-", "_")])
    parser.add_argument("--layer", type=int, default=-1)
    options = vars(parser.parse_args())
    captions, folder = options.pop("captions"), options.pop("folder")
    try:
        (post,) = remove_components(
            CaptionEncoder(EncoderConfig(**options)).encode(first_captions(captions, CAPTIONS)), [1]
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    with atomic_directory(folder) as temporary:
        post.save(temporary)


if __name__ == "__main__":
    main()
