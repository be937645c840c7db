"""Caches for the quickstart's tests: random embeddings, each caption's decided by its text."""

from __future__ import annotations

from pathlib import Path

import torch

from llm2clip_plugin.contracts import TeacherIdentity
from llm2clip_plugin.data.cache.rows import caption_rows
from llm2clip_plugin.data.cache.writer import CacheWriter
from llm2clip_plugin.data.sources.open import SourceConfig, open_source
from llm2clip_plugin.data.sources.records import caption_hash

WIDTH = 16
IDENTITY = TeacherIdentity(
    llm="random",
    revision="",
    weights_sha256="0",
    adapter_sha256="",
    attention="causal",
    pooling="mean",
    layer=-1,
    prompt="",
    chat_template="",
    max_tokens=8,
    width=WIDTH,
)


def write_cache(data: Path, directory: Path, identity: TeacherIdentity = IDENTITY) -> None:
    """A whole cache whose embeddings are random, each caption's decided by its text."""
    source = open_source(SourceConfig(path=str(data)))
    writer = CacheWriter(directory, identity)
    for shard in source.shards:
        samples = [source.captions(number) for number in range(shard.start, shard.start + shard.size)]
        rows = caption_rows(captions for _, captions in samples)
        texts = [caption.text for _, captions in samples for caption in captions]
        assert len(texts) == len(rows)
        vectors = [
            torch.randn(WIDTH, generator=torch.Generator().manual_seed(abs(caption_hash(text)))) for text in texts
        ]
        writer.write_shard(shard.name, [key for key, _ in samples], rows, torch.stack(vectors))
    writer.finish()
