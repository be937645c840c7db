"""Where a shard's embeddings lie in a cache. Standard library only."""

import hashlib
from pathlib import Path


def shard_file(shard: str) -> str:
    """File name of a shard, relative to the cache; a hash for a shard name that would lead out of the folder."""
    parts = Path(shard).parts
    if not parts or Path(shard).is_absolute() or ".." in parts:
        return f"shard-{hashlib.sha256(shard.encode()).hexdigest()[:16]}.safetensors"
    return f"{shard}.safetensors"
