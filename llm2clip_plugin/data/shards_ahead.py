"""Shards at URLs and on network file systems are brought near before the order reaches them."""

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
        self._sources = list(sources)
        self._whole = whole
        self._current: dict[int, tuple[int, int]] = {}  # source -> pass and window that are being read
        self._jobs: queue.SimpleQueue[tuple[Source, int] | None] = queue.SimpleQueue()  # None: no more
        self._thread: threading.Thread | None = None
        self._warned: set[int] = set()

    def __del__(self) -> None:
        self._jobs.put(None)

    def __call__(self, position: int) -> None:
        """The run is about to read the batch at ``position``."""
        for number, source in enumerate(self._sources):
            if not self._mixture.windows[number] or not source.bytes_to_fetch(range(1)):
                continue
            if not (is_url(source.path) or self._whole):
                continue
            window = self._mixture.window(number, position)
            if self._current.get(number) == window:
                continue
            self._current[number] = window
            shards, following = (self._mixture.window_shards(number, window[0], window[1] + later) for later in (0, 1))
            need = source.bytes_to_fetch({*shards, *following})
            limit, *words = _limit(source)
            if need > limit:
                self._warn(number, need, *words)
            else:
                self._begin(source, following)

    def _warn(self, number: int, need: int, limit: str, remedy: str) -> None:
        """Once for a source."""
        if number in self._warned:
            return
        self._warned.add(number)
        log.warning(
            "%s: two windows of shards have %.1f GB, more than %s, so training waits for its disk or server at the end "
            "of each window; %s or lower shuffle_window",
            self._sources[number].path,
            need / 1e9,
            limit,
            remedy,
        )

    def _begin(self, source: Source, shards: Sequence[int]) -> None:
        for shard in shards:
            self._jobs.put((source, shard))
        if self._thread is None:
            self._thread = threading.Thread(target=_fetch, args=(self._jobs,), name="shards-ahead", daemon=True)
            self._thread.start()


def _limit(source: Source) -> tuple[float, str, str]:
    """Bytes that two windows may have, whose limit that is, and how to raise it."""
    if is_url(source.path):
        gigabytes = source.config.cache_gb
        return gigabytes * 1e9 or float("inf"), f"cache_gb {gigabytes:g}", "raise cache_gb"
    import psutil  # comes with DeepSpeed

    free = psutil.virtual_memory().available
    return MEMORY_SHARE * free, f"half of the available memory ({free / 1e9:.1f} GB)", "free memory"


def _fetch(jobs: "queue.SimpleQueue[tuple[Source, int] | None]") -> None:
    while (job := jobs.get()) is not None:
        source, shard = job
        try:
            source.fetch(shard)
        except (OSError, ValueError) as error:  # whoever reads the shard meets it again, and stops the run
            log.warning("shard %r could not be fetched ahead: %s", source.shards[shard].name, error)
