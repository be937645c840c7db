"""Shards at URLs and on network file systems are prefetched before the order reaches them."""

import logging
import queue
import threading
from collections.abc import Sequence

from llm2clip_plugin.data.sampler import Mixture
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.urls import is_url

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.5  # of the available memory, for two windows in the page cache


class ShardsAhead:
    """Fetches the next window of each source's shards in a thread, while the current one is read.

    Only for sources that are read in windows. Shards at a URL are downloaded. Those on a network file system are read
    once from beginning to end with ``whole``: if this machine reads all samples, and for its other ranks, too.
    Nothing is fetched if two windows don't fit into ``cache_gb`` or memory, because that would evict what is being
    read; a warning is logged.
    """

    def __init__(self, mixture: Mixture, sources: Sequence[Source], *, whole: bool = False) -> None:
        self._mixture = mixture
        self._sources = {
            number: source
            for number, source in enumerate(sources)
            if mixture.windows[number] and source.bytes_to_fetch(range(1)) and (whole or is_url(source.path))
        }
        self._current: dict[int, tuple[int, int]] = {}  # source -> pass and window that are being read
        self._jobs: queue.SimpleQueue[tuple[Source, int] | None] = queue.SimpleQueue()  # None: no more
        self._thread: threading.Thread | None = None
        self._warned: set[int] = set()

    def __del__(self) -> None:
        self._jobs.put(None)

    def __call__(self, position: int) -> None:
        """The run is about to read the batch at ``position``."""
        for number, source in self._sources.items():
            window = self._mixture.window(number, position)
            if self._current.get(number) == window:
                continue
            self._current[number] = window
            shards, following = (self._mixture.window_shards(number, window[0], window[1] + later) for later in (0, 1))
            need, limit = source.bytes_to_fetch({*shards, *following}), _limit(source)
            if need <= limit:
                self._begin(source, following)
            elif number not in self._warned:
                self._warned.add(number)
                log.warning(
                    "%s: two windows of shards have %.1f GB, more than %s (%.1f GB), so training waits for its disk "
                    "or server at the end of each window; raise it or lower shuffle_window",
                    source.path,
                    need / 1e9,
                    "cache_gb" if is_url(source.path) else "half of the available memory",
                    limit / 1e9,
                )

    def _begin(self, source: Source, shards: Sequence[int]) -> None:
        for shard in shards:
            self._jobs.put((source, shard))
        if self._thread is None:
            self._thread = threading.Thread(target=_fetch, args=(self._jobs,), name="shards-ahead", daemon=True)
            self._thread.start()


def _limit(source: Source) -> float:
    """Bytes that two windows may have."""
    if is_url(source.path):
        return source.config.cache_gb * 1e9 or float("inf")
    import psutil  # comes with DeepSpeed

    return MEMORY_SHARE * psutil.virtual_memory().available


def _fetch(jobs: "queue.SimpleQueue[tuple[Source, int] | None]") -> None:
    while (job := jobs.get()) is not None:
        source, shard = job
        try:
            source.fetch(shard)
        except (OSError, ValueError) as error:  # whoever reads the shard meets it again, and stops the run
            log.warning("shard %r could not be prefetched: %s", source.shards[shard].name, error)
