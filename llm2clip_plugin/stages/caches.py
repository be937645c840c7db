"""The embedding caches of a run's data."""

from collections.abc import Sequence

from llm2clip_plugin.contracts import PROJECTED, CacheManifest, TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.sources import Source, SourceConfig, data_folder
from llm2clip_plugin.text.config import embed_command


def find_cache(
    source: SourceConfig,
    teacher: TeacherIdentity | None = None,
    *,
    of_clip: bool = False,
) -> str:
    """The only ``embeddings-*`` folder of an LLM, or of a CLIP's text tower, next to the data.

    ``teacher``: for the message, if it is known. Raises FileNotFoundError if there is none,
    ValueError if there are several.
    """
    folder = data_folder(source.path)
    caches = []
    for path in sorted(folder.glob(f"embeddings-*/{CacheManifest.FILE}")):
        if (CacheManifest.read(path).teacher.get("pooling") == PROJECTED) is of_clip:
            caches.append(str(path.parent))
    option = "--clip-cache" if of_clip else "--cache"
    kind = "of a CLIP's text features" if of_clip else "of an LLM"
    if not caches:
        create = embed_command(source.path, None if of_clip else teacher)
        raise FileNotFoundError(
            f"no embedding cache {kind} (embeddings-*) in {folder}; create it: {create}"
        )
    if len(caches) > 1:
        raise ValueError(
            f"{folder} contains the caches {', '.join(caches)} {kind}; choose one with {option}"
        )
    return caches[0]


def open_caches(
    sources: Sequence[Source],
    paths: Sequence[str],
    teacher: TeacherIdentity | None = None,
    *,
    of_clip: bool = False,
) -> list[EmbeddingCache]:
    """The cache of each source, all of one teacher (that of the first, unless it is given), checked
    against them."""
    caches: list[EmbeddingCache] = []
    for source, path in zip(sources, paths or ("",) * len(sources), strict=True):
        folder = path or find_cache(source.config, teacher, of_clip=of_clip)
        fingerprint = teacher.fingerprint if teacher else None
        cache = EmbeddingCache.open(folder, expect_fingerprint=fingerprint)
        cache.check(source)
        caches.append(cache)
        teacher = caches[0].teacher
    return caches
