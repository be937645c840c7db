"""Shards at URLs are downloaded before the order reaches them."""

import logging
import queue
import threading
from collections.abc import Sequence

from llm2clip_plugin.data.sampler import Mixture
from llm2clip_plugin.data.sources.base import Source

log = logging.getLogger(__name__)


class ShardsAhead:
    """Downloads the next window of each source's shards in a thread, while the current one is read.

    Only for sources that are read in windows and whose shards are at a URL: a file system over a network reads members
    of an open shard, not entire shards, and an open is short. If ``cache_gb`` does not hold two windows, nothing is
    downloaded ahead, because that would evict what is being read; a warning is logged.
    """

    def __init__(self, mixture: Mixture, sources: Sequence[Source]) -> None:
        self._mixture = mixture
        self._sources = list(sources)
        self._current: dict[int, tuple[int, int]] = {}  # source -> pass and window that are being read
        self._jobs: queue.SimpleQueue[tuple[Source, int] | None] = queue.SimpleQueue()  # None: no more
        self._thread: threading.Thread | None = None
        self._warned: set[int] = set()

    def __del__(self) -> None:
        self._jobs.put(None)

    def __call__(self, position: int) -> None:
        """The run is about to read the batch at ``position``."""
        for number, source in enumerate(self._sources):
            if not self._mixture.windows[number] or not source.download_bytes(range(1)):
                continue
            window = self._mixture.window(number, position)
            if self._current.get(number) == window:
                continue
            self._current[number] = window
            shards, following = (self._mixture.window_shards(number, window[0], window[1] + later) for later in (0, 1))
            limit, need = source.config.cache_gb * 1e9, source.download_bytes({*shards, *following})
            if limit and need > limit:
                self._warn(number, need)
            else:
                self._begin(source, following)

    def _warn(self, number: int, need: int) -> None:
        """Once for a source."""
        source = self._sources[number]
        if number in self._warned:
            return
        self._warned.add(number)
        log.warning(
            "%s: two windows of shards have %.1f GB, more than cache_gb %g, so training waits for a download at the "
            "end of each window; raise cache_gb or lower shuffle_window",
            source.path,
            need / 1e9,
            source.config.cache_gb,
        )

    def _begin(self, source: Source, shards: Sequence[int]) -> None:
        for shard in shards:
            self._jobs.put((source, shard))
        if self._thread is None:
            self._thread = threading.Thread(
                target=_download, args=(self._jobs,), name="llm2clip-shards-ahead", daemon=True
            )
            self._thread.start()


def _download(jobs: "queue.SimpleQueue[tuple[Source, int] | None]") -> None:
    while (job := jobs.get()) is not None:
        source, shard = job
        try:
            source.download(shard)
        except (OSError, ValueError) as error:  # whoever reads the shard meets it again, and stops the run
            log.warning("shard %r could not be downloaded ahead: %s", source.shards[shard].name, error)
