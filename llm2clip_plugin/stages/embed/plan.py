"""``llm2clip embed ... --dry-run``: the cache's size, from the captions and the LLM's config.json alone."""

from pathlib import Path

from llm2clip_plugin.data.cache.dtypes import CACHE_DTYPES
from llm2clip_plugin.data.cache.rows import caption_rows
from llm2clip_plugin.data.cache.shard_file import shard_bytes
from llm2clip_plugin.data.sources.open import check_fields, open_source
from llm2clip_plugin.progress import track
from llm2clip_plugin.stages.embed.config import EmbedConfig
from llm2clip_plugin.stages.paper import TEACHERS
from llm2clip_plugin.text.embed import default_cache_folder
from llm2clip_plugin.text.settings import EncoderConfig


def cache_plan(config: EmbedConfig) -> str:
    """The number of captions and the cache's size in both formats; reads every caption, but no weights.

    Raises ValueError for data at a URL without ``cache``.
    """
    if not config.cache:
        default_cache_folder(config.source.path, "")  # raises for a URL, before anything is downloaded
    source = open_source(config.source)
    check_fields(source, needed=True)
    rows = key_bytes = 0
    for number in track(range(len(source)), total=len(source), label="captions", unit="samples"):
        key, captions = source.captions(number)
        key_bytes += len(key.encode())
        rows += len(caption_rows([captions]))
    width = width_of(config.encoder)
    lines = [f"{len(source):,} samples, {rows:,} captions to embed in {len(source.shards)} shards of {source.path}"]
    if not width:
        lines.append(f"no local config.json for {config.encoder.llm}; sizes for the paper's LLMs:")
    for size in (width,) if width else [teacher.width for teacher in TEACHERS.values()]:
        listed = (
            f"{dtype} {readable(shard_bytes(len(source), rows, size, dtype, key_bytes=0) + key_bytes)}"
            for dtype in CACHE_DTYPES
        )
        lines.append(f"cache on disk: {rows:,} captions x {size}: {', '.join(listed)}")
    return "\n".join(lines)


def readable(size: float) -> str:
    """A number of bytes in the unit that gives 1 to 999."""
    units = ("kB", "MB", "GB", "TB")
    step = next((n for n in range(len(units)) if size < 1000 ** (n + 2)), len(units) - 1)
    return f"{size / 1000 ** (step + 1):.1f} {units[step]}"


def width_of(config: EncoderConfig) -> int:
    """Width of the LLM's states, from the config.json in its folder or in the local Hub cache; 0 if there is none."""
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
    settings = AutoConfig.from_pretrained(folder)
    if hasattr(settings, "vision_config") and hasattr(settings, "projection_dim"):
        return int(settings.projection_dim)  # a CLIP
    return int(settings.get_text_config().hidden_size)
