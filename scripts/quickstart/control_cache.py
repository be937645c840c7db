#!/usr/bin/env python3
"""Make a control's cache: other pictures with the same embeddings, or random embeddings of the same captions.

    scripts/quickstart/control_cache.py DATA/shuffled --cache DATA/cache/raw --output DATA/shuffled/cache
    scripts/quickstart/control_cache.py DATA/all --cache DATA/cache/raw --output DATA/cache/random --random 0

Training refuses a picture that is not the one whose captions were embedded. The pictures of the first control are
exchanged on purpose, so its cache notes them; the embeddings are copied. With --random SEED, each text has a vector of
its own, standard normal and the same wherever the text occurs: a tower trained against it learns to tell its concepts
apart, and nothing about what they mean. Only the width is taken from --cache.
"""

import argparse
import sys
from pathlib import Path

import torch
from inputs import RANDOM
from torch import Tensor

from llm2clip_plugin.contracts import CacheManifest, TeacherIdentity, atomic_directory, sha256_text, shard_file
from llm2clip_plugin.data.cache import CacheWriter, ShardFile, caption_rows, rows_digest
from llm2clip_plugin.data.cache_proof import shard_captions
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source


def write_control(data: Path, cache: Path, output: Path, seed: int | None = None) -> None:
    """Write the cache of the shards in ``data``; ``seed``: of random embeddings, None to copy those of ``cache``.

    Raises ValueError if the captions are not those of ``cache``, whose embeddings are to be copied.
    """
    manifest = CacheManifest.read(cache / CacheManifest.FILE)
    teacher = manifest.teacher
    if seed is not None:
        weights = sha256_text(f"{RANDOM} {seed}")
        teacher = {**teacher, "llm": RANDOM, "weights_sha256": weights, "adapter_sha256": "", "adapter": ""}
    source = open_source(SourceConfig(path=str(data / ("train-*.tar" if seed is None else "*.tar"))))
    with atomic_directory(output, replace=True) as temporary:
        writer = CacheWriter(temporary, TeacherIdentity(**teacher), manifest.dtype)
        for shard in source.shards:
            keys, captions = shard_captions(source, shard)
            rows = caption_rows(captions)
            if seed is None:
                file = ShardFile(cache / shard_file(shard.name))
                if rows_digest(keys, rows) != file.meta["rows_sha256"]:
                    raise ValueError(f"the captions of shard {shard.name} in {data} are not those of {file.path}")
                embeddings = torch.from_numpy(file["embeddings"]).float() * torch.from_numpy(file["scales"])[:, None]
            else:
                embeddings = torch.stack([random_vector(text, seed, teacher["width"]) for _, text in rows])
            writer.write_shard(shard.name, keys, rows, embeddings)
        writer.finish()


def random_vector(caption_hash: int, seed: int, width: int) -> Tensor:
    """(W,) standard normal, decided by the caption's hash and the seed."""
    generator = torch.Generator().manual_seed(int(sha256_text(f"{seed} {caption_hash}")[:15], 16))
    return torch.randn(width, generator=generator)


def main() -> None:
    """Parse the command line and write the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the control's shards")
    parser.add_argument("--cache", type=Path, required=True, help="the teacher's cache of the same captions")
    parser.add_argument("--output", type=Path, required=True, help="folder of the control's cache")
    parser.add_argument("--random", type=int, metavar="SEED", help="random embeddings instead of the teacher's")
    options = parser.parse_args()
    try:
        write_control(options.data, options.cache, options.output, options.random)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
