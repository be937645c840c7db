"""``llm2clip embed ... --dry-run``: how large the cache will be, from the captions and the LLM's config.json alone."""

from __future__ import annotations

from pathlib import Path

from llm2clip_plugin.data.cache.shard_file import CACHE_DTYPES, shard_bytes
from llm2clip_plugin.data.cache.writer import caption_rows
from llm2clip_plugin.data.sources.open import Source
from llm2clip_plugin.progress import track
from llm2clip_plugin.text.settings import EncoderConfig

USUAL_WIDTHS = (2048, 4096)  # of the paper's LLMs: Llama 3.2 1B and 3 8B


def cache_plan(source: Source, config: EncoderConfig) -> str:
    """Captions, and the cache's bytes on disk in both formats; every caption is read, no weight is."""
    rows = key_bytes = 0
    for number in track(range(len(source)), total=len(source), label="captions", unit="samples"):
        key, captions = source.captions(number)
        key_bytes += len(key.encode())
        rows += len(caption_rows([captions]))
    width = width_of(config)
    lines = [f"{len(source):,} samples, {rows:,} captions to embed in {len(source.shards)} shards of {source.path}"]
    if not width:
        lines.append(f"{config.llm}: no config.json here says how wide its embeddings are; the paper's LLMs:")
    for size in (width,) if width else USUAL_WIDTHS:
        listed = (
            f"{dtype} {readable(shard_bytes(len(source), rows, size, dtype, key_bytes=0) + key_bytes)}"
            for dtype in CACHE_DTYPES
        )
        lines.append(f"cache on disk: {rows:,} captions x {size}: {', '.join(listed)}")
    return "\n".join(lines)


def readable(size: float) -> str:
    """Bytes in the unit that leaves 1 to 999 of them."""
    units = ("kB", "MB", "GB", "TB")
    step = next((n for n in range(len(units)) if size < 1000 ** (n + 2)), len(units) - 1)
    return f"{size / 1000 ** (step + 1):.1f} {units[step]}"


def width_of(config: EncoderConfig) -> int:
    """Width of the LLM's states by its config.json, in its folder or in the Hub's cache on this machine; 0: unknown."""
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig

    folder = Path(config.llm)
    if not folder.is_dir():
        if config.llm.count("/") != 1:
            return 0
        found = try_to_load_from_cache(config.llm, "config.json", revision=config.revision or None)
        folder = Path(found).parent if isinstance(found, str) else folder
    if not (folder / "config.json").is_file():
        return 0
    return int(AutoConfig.from_pretrained(folder).get_text_config().hidden_size)
