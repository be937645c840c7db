"""``llm2clip embed``, stage 1.5: captions and a frozen LLM in, a cache of embeddings out."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from llm2clip_plugin.contracts import CACHE_DTYPES, CacheManifest, EmbedRecord
from llm2clip_plugin.data.cache import shard_bytes
from llm2clip_plugin.data.cache_file import caption_rows
from llm2clip_plugin.data.cache_writer import CacheWriter
from llm2clip_plugin.data.sources import Source, check_fields, open_source
from llm2clip_plugin.outside import without_queries
from llm2clip_plugin.progress import phase, track
from llm2clip_plugin.run_folder import started_by
from llm2clip_plugin.stages.embed_config import EMBED, EmbedConfig
from llm2clip_plugin.stages.settings import rank_and_world
from llm2clip_plugin.text.config import effective
from llm2clip_plugin.text.embed import cache_folder, default_cache_folder, embed_source
from llm2clip_plugin.text.encoder import TextEncoder
from llm2clip_plugin.text.llm import llm_config
from llm2clip_plugin.text.teacher import open_encoder
from llm2clip_plugin.text.verify import renew_cache, verify
from llm2clip_plugin.train.distributed import leaving_together
from llm2clip_plugin.train.guard import watched_group

# in the folder of a cache, also an unfinished one
CACHE_RECORDS = (CacheManifest.FILE, EmbedRecord.FILE)


def main(argv: list[str]) -> int:
    """Embed this rank's shards, verify a cache, or print the plan."""
    config = EMBED.parse(argv)
    if config.dry_run:
        if rank_and_world()[0] == 0:
            print(cache_plan(config))
        return 0
    if config.verify:
        print(verify(*open_all(config)))
        return 0
    with _ranks() as (rank, world):
        source, encoder, directory = open_all(config)
        if rank == 0:
            names = [shard.name for shard in source.shards]
            record = EmbedRecord(
                data=source.path, shards=names, command=started_by("embed", argv)
            )
            writer = CacheWriter(directory, encoder.identity(), config.dtype)
            if not writer.manifest().complete:
                record.write(directory / EmbedRecord.FILE)
        manifest, summary = embed_source(
            source,
            encoder,
            directory,
            config.dtype,
            rank,
            world,
            tokens_per_batch=config.tokens_per_batch,
            quiet=rank != 0,
            overwrite=config.overwrite,
        )
        if rank == 0:
            # a complete cache's, only now that nothing was refused
            record.write(directory / EmbedRecord.FILE)
        if world > 1 and manifest is None:
            print(
                f"rank {rank}: its shards are complete; other ranks are still embedding",
                file=sys.stderr,
            )
    prefix = f"rank {rank}: " if world > 1 else ""
    for line in summary.lines(encoder.config.max_tokens):
        print(prefix + line)
    if manifest is not None:
        held = f"{manifest.captions} captions in {len(manifest.shards)} shards, {manifest.dtype}"
        print(f"{directory}: {held}, complete")
    return 0


@contextmanager
def _ranks() -> Iterator[tuple[int, int]]:
    """This rank and their number. Under a launcher (MASTER_ADDR) they watch each other; else each
    may run by itself."""
    if "MASTER_ADDR" not in os.environ:
        yield rank_and_world()
        return
    with watched_group() as ranks, phase("embedding"), leaving_together():
        yield ranks


def open_all(config: EmbedConfig) -> tuple[Source, TextEncoder, Path]:
    """The captions, the LLM and the cache's folder. Raises ValueError for data at a URL without
    ``cache``."""
    if not config.cache:  # before anything is downloaded or loaded
        default_cache_folder(config.source.path, "")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    source = open_source(config.source)
    check_fields(source, needed=True)
    if config.cache:
        refuse_foreign_folder(Path(config.cache))
    encoder = open_encoder(config.encoder)
    if config.torch_compile:
        encoder.compile()
    if config.cache:
        folder = Path(config.cache)
    else:
        folder = cache_folder(source.path, encoder.identity())
    renew_cache(source, encoder, folder)
    return source, encoder, folder


def refuse_foreign_folder(folder: Path) -> None:
    """Raise ValueError for a folder with files of which none is a cache's. Shards' names may have
    folders, and another rank may have written some before the first rank wrote the record."""
    if not folder.is_dir() or any((folder / name).is_file() for name in CACHE_RECORDS):
        return
    foreign: list[str] = []
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".")
        if path.is_file() and path.suffix != ".safetensors" and not hidden:
            foreign.append(path.name)
    if foreign:
        raise ValueError(
            f"--cache {folder} is no cache: it has {foreign[0]}; choose another folder"
        )


def cache_plan(config: EmbedConfig) -> str:
    """The number of captions and the cache's size in both formats; reads every caption, but no
    weights."""
    source = open_source(config.source)
    check_fields(source, needed=True)
    numbers = track(
        range(len(source)), total=len(source), label="captions", unit="samples"
    )
    rows = sum(len(caption_rows([source.captions(number)[1]])) for number in numbers)
    settings = llm_config(config.encoder)
    clip = hasattr(settings, "vision_config") and hasattr(settings, "projection_dim")
    if not clip:  # refuse what the run would
        adapter = Path(config.encoder.adapter) if config.encoder.adapter else None
        effective(config.encoder, Path(config.encoder.llm), adapter)
    if clip:
        width = int(settings.projection_dim)
    else:
        width = int(settings.get_text_config().hidden_size)
    samples = len(source)
    sizes: list[str] = []
    for dtype in CACHE_DTYPES:
        # as img2dataset's keys
        size = shard_bytes(samples, rows, width, dtype, key_bytes=9)
        sizes.append(f"{dtype} {tqdm.format_sizeof(size, 'B')}")
    listed = ", ".join(sizes)
    return (
        f"{samples:,} samples, {rows:,} captions to embed in {len(source.shards)} shards of "
        f"{without_queries(source.path)}\ncache on disk: {rows:,} captions x {width}: {listed}"
    )
