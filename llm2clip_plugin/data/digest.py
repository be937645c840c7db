"""What ranks compare of their data and caches: counts, and digests over what indexes and manifests say."""

from llm2clip_plugin.contracts import canonical_json, sha256_text
from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.sources.base import Source


def source_digest(source: Source) -> str:
    """``3318333 samples in 332 shards (1f0c...)``: over the shards' names and numbers of samples."""
    shards = [(shard.name, shard.size) for shard in source.shards]
    return f"{len(source)} samples in {len(shards)} shards ({short_digest(shards)})"


def cache_digest(cache: EmbeddingCache) -> str:
    """``6636666 captions (1f0c...)``: over the manifest, which has a hash of each shard's rows."""
    manifest = cache.manifest
    shards = {  # caches of older versions have no "bytes"
        name: {key: value for key, value in entry.items() if key != "bytes"} for name, entry in manifest.shards.items()
    }
    return f"{manifest.captions} captions ({short_digest([manifest.fingerprint, manifest.dtype, shards])})"


def short_digest(value: object) -> str:
    """The first digits of a JSON value's SHA-256."""
    return sha256_text(canonical_json(value))[:12]
