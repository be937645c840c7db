#!/usr/bin/env python3
"""Make the control's cache from the teacher's: same captions and embeddings, other pictures.

    scripts/quickstart/control_cache.py DATA/shuffled --cache DATA/cache/raw --output DATA/shuffled/cache

Training refuses a picture that is not the one whose captions were embedded. The control's pictures are exchanged on
purpose, so its cache notes them; the embeddings are copied.
"""

import argparse
import sys
from pathlib import Path

import torch

from llm2clip_plugin.contracts import CacheManifest, TeacherIdentity, atomic_directory
from llm2clip_plugin.data.cache.names import shard_file
from llm2clip_plugin.data.cache.rows import caption_rows, rows_digest, shard_contents
from llm2clip_plugin.data.cache.shard_file import ShardFile
from llm2clip_plugin.data.cache.writer import CacheWriter
from llm2clip_plugin.data.sources.open import SourceConfig, open_source


def copy_embeddings(data: Path, cache: Path, output: Path) -> None:
    """Write the cache of the shards in ``data``. Raises ValueError if their captions are not those of ``cache``."""
    manifest = CacheManifest.read(cache / CacheManifest.FILE)
    source = open_source(SourceConfig(path=str(data / "train-*.tar")))
    with atomic_directory(output, replace=True) as temporary:
        writer = CacheWriter(temporary, TeacherIdentity(**manifest.teacher), manifest.dtype)
        for shard in source.shards:
            keys, captions, image_checks = shard_contents(source, shard)
            rows, file = caption_rows(captions), ShardFile(cache / shard_file(shard.name))
            if rows_digest(keys, rows) != file.meta["rows_sha256"]:
                raise ValueError(f"the captions of shard {shard.name} in {data} are not those of {file.path}")
            embeddings = torch.from_numpy(file["embeddings"]).float() * torch.from_numpy(file["scales"])[:, None]
            writer.write_shard(shard.name, keys, rows, embeddings, image_checks=image_checks)
        writer.finish()


def main() -> None:
    """Parse the command line and write the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the control's shards")
    parser.add_argument("--cache", type=Path, required=True, help="the teacher's cache of the same captions")
    parser.add_argument("--output", type=Path, required=True, help="folder of the control's cache")
    options = parser.parse_args()
    try:
        copy_embeddings(options.data, options.cache, options.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
