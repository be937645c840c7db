"""Stage 1.5, ``llm2clip embed``: a command line into a plan or into a cache of the teacher's caption embeddings.

Ranks are told apart by RANK and WORLD_SIZE, as torchrun and the DeepSpeed launcher set them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llm2clip_plugin.data.cache.shard_file import CACHE_DTYPES
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.stages.embed.plan import cache_plan
from llm2clip_plugin.text.embed import default_cache_folder, embed_source, verify
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.settings import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Embed the captions of DATA with a frozen LLM. Usage: llm2clip embed DATA --llm PATH_OR_HUB_ID [options]."""

    source: SourceConfig  # the captioned images
    encoder: EncoderConfig  # the LLM
    cache: str = ""  # folder of the cache; "" is embeddings-<fingerprint> in the data's folder
    dtype: str = "float16"  # storage: float16, or int8 with a scale per row (half the size)
    tokens_per_batch: int = 0  # tokens of a batch, padding included; 0 chooses by device
    dry_run: bool = False  # print how many captions there are and how large the cache will be, and stop
    verify: bool = False  # write nothing: read every byte of the cache, compare it with the data, embed a sample again

    def __post_init__(self) -> None:
        if self.dtype not in CACHE_DTYPES:
            raise ValueError(f"unknown cache dtype {self.dtype!r}; known: {', '.join(CACHE_DTYPES)}")
        if self.tokens_per_batch < 0:
            raise ValueError(f"tokens_per_batch {self.tokens_per_batch} must not be negative")


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, from the launcher's environment; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def parse(argv: Sequence[str]) -> EmbedConfig:
    """The configuration from a command line; DATA may stand first, without ``--path``."""
    import tyro

    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--path")
    config = tyro.conf.OmitArgPrefixes[EmbedConfig]
    return tyro.cli(config, args=words, prog="llm2clip embed")


def main(argv: list[str]) -> int:
    """``llm2clip embed DATA --llm PATH_OR_HUB_ID [--cache DIR] [--dtype int8] [--verify]``."""
    config = parse(argv)
    rank, world = rank_and_world()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not config.cache:
        default_cache_folder(config.source.path, "")  # refuses a URL before anything is downloaded
    source = open_source(config.source)
    if config.dry_run:
        if rank == 0:
            print(cache_plan(source, config.encoder))
        return 0
    encoder = CaptionEncoder(config.encoder)
    directory = (
        Path(config.cache) if config.cache else default_cache_folder(source.path, encoder.identity().fingerprint)
    )
    if config.verify:
        print(verify(source, encoder, directory))
        return 0
    manifest, tally = embed_source(
        source,
        encoder,
        directory,
        config.dtype,
        rank,
        world,
        tokens_per_batch=config.tokens_per_batch,
        quiet=rank != 0,
    )
    prefix = f"rank {rank}: " if world > 1 else ""
    for line in tally.lines(encoder.config.max_tokens):
        print(prefix + line)
    if manifest is not None:
        print(f"{directory}: {manifest.captions} captions in {len(manifest.shards)} shards, {manifest.dtype}, whole")
    return 0
