"""The rows of a batch: an image with the teacher's embeddings of its captions, or captions alone;
and training batches.

Shapes: b images of a batch on one rank, S pixels a side, k captions of an image, W width of a
teacher embedding, V of a second one.

A row is a function of (seed, pass, sample). A sample that can't be used is replaced by another,
which is a function of them too.
"""

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig, as_square, evaluation_pixels, training_pixels
from llm2clip_plugin.data.remote import shuffle_window, take_retries
from llm2clip_plugin.data.sampler import Draw, Mixture, hash_words, sample_rng
from llm2clip_plugin.data.samples import (
    PREFETCH_MB,
    SMALL_PART,
    AugmentConfig,
    BrokenImage,
    BrokenSample,
    Caption,
    caption_hash,
    choose_captions,
    plan_evaluation,
    plan_loading,
    row_bytes,
    select_captions,
)
from llm2clip_plugin.data.sources import Source

SUBSTITUTES = 20  # samples tried in place of a broken one
GRACE = 60  # seconds that a loader process outlives SIGTERM
SOURCE_BITS = 40  # an image's id is (source << 40) + sample; more samples than any source has


@dataclass(frozen=True)
class Row:
    """One image of a batch with k of its captions."""

    pixels: np.ndarray | None  # (S, S, 3) uint8; None for captions alone
    captions: tuple[Caption, ...]
    embeddings: torch.Tensor | None  # (k, W) float32; None without a cache
    targets: torch.Tensor | None  # (k, V) float32 from a second cache, None without one
    image_id: int
    key: str
    broken: tuple[BrokenSample, ...]  # the samples that this row replaces
    meta: Mapping[str, Any] = field(default_factory=dict)  # of an evaluated sample
    # of an image that keeps its aspect: rows and columns of patches
    shape: tuple[int, int] | None = None


@dataclass(eq=False)
class PairDataset(Dataset):
    """The row of a draw: augmented image and one of its selected captions, a function of (seed,
    pass, sample)."""

    sources: Sequence[Source]
    caches: Sequence[EmbeddingCache | None]  # one a source
    images: ImageConfig | None  # None for captions alone, whose images are not read
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    _: KW_ONLY
    seed: int
    # how often each kind is drawn; {}: evenly
    caption_weights: Mapping[str, float] = field(default_factory=dict)
    captions_per_image: int = 1  # captions k of a row; an image that has fewer repeats them
    # a second cache a source, of the same captions by another teacher
    targets: Sequence[EmbeddingCache] = ()
    # size of the global batches, each of one source; 0: a batch mixes the sources
    one_source_batch: int = 0

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's image and embeddings."""
        width = cache_width(self.caches) + cache_width(self.targets)
        side = 0 if self.images is None else self.images.size
        return row_bytes(side, width * self.captions_per_image)

    def mixture(self) -> Mixture:
        """The order in which samples of these sources are drawn."""
        paths = [source.path for source in self.sources]
        sizes: list[list[int]] = []
        weights: list[float] = []
        windows: list[int] = []
        for source in self.sources:
            sizes.append([shard.size for shard in source.shards])
            weights.append(source.config.weight)
            windows.append(shuffle_window(source.config.shuffle_window, paths))
        return Mixture(sizes, weights, self.seed, windows, batch=self.one_source_batch)

    def __getitem__(self, draw: Draw) -> Row:
        """Raises ValueError if a sample and all of its substitutes are broken."""
        broken: list[BrokenSample] = []
        length = len(self.sources[draw.source])
        for attempt in range(SUBSTITUTES + 1):
            index = draw.index
            if attempt:
                words = (self.seed, draw.epoch, draw.source, draw.index, attempt)
                index = hash_words("substitute", *words) % length
            try:
                return self._row(Draw(draw.source, index, draw.epoch), tuple(broken))
            except BrokenSample as error:
                broken.append(error)
        listed = "\n".join(f"  {error}" for error in broken)
        path = self.sources[draw.source].path
        raise ValueError(f"{len(broken)} consecutive samples of {path} are broken:\n{listed}")

    def _row(self, draw: Draw, broken: tuple[BrokenSample, ...]) -> Row:
        source = self.sources[draw.source]
        cache = self.caches[draw.source]
        shard, within = source.locate(draw.index)
        sample = None if self.images is None else source[draw.index]
        if sample is None:
            key, all_captions = source.captions(draw.index)
        else:
            key = sample.key
            all_captions = sample.captions
        kinds = source.config.kinds or tuple(self.caption_weights)
        captions = select_captions(all_captions, kinds, source.config.languages)
        if not captions:
            available = sorted({f"{caption.kind}:{caption.language}" for caption in all_captions})
            wanted = f"kinds {tuple(kinds)} and languages {source.config.languages}"
            reason = f"no caption of {wanted}; available: {', '.join(available) or 'none'}"
            raise BrokenSample(shard, key, reason)
        rng = sample_rng(self.seed, draw.epoch, draw.source, draw.index)
        chosen = choose_captions(captions, self.caption_weights, self.captions_per_image, rng)
        pixels = shape = None
        if sample is not None and self.images is not None:
            try:
                pixels = training_pixels(sample.read_image(), self.images, self.augment, rng)
                pixels, shape = as_square(pixels, self.images)
            except BrokenImage as error:
                raise BrokenSample(shard, key, str(error)) from error
        embeddings = None
        if cache is not None:
            embeddings = cache.rows(shard, within, chosen, key=key)
        targets = None
        if self.targets:
            targets = self.targets[draw.source].rows(shard, within, chosen, key=key)
        image_id = (draw.source << SOURCE_BITS) + draw.index
        return Row(pixels, chosen, embeddings, targets, image_id, key, broken, shape=shape)


def cache_width(caches: Sequence[EmbeddingCache | None]) -> int:
    """Width of the caches' embeddings; 0 if there is none."""
    return next((cache.width for cache in caches if cache is not None), 0)


def collate(rows: list[Row]) -> dict[str, Any]:
    """Rows to tensors and lists; with one caption an image, its hash and embedding have no axis for
    it."""
    hashes: list[list[int]] = []
    for row in rows:
        hashes.append([caption_hash(caption.text) for caption in row.captions])
    hashes_bk = torch.tensor(hashes)
    has_one_caption = hashes_bk.shape[1] == 1
    batch: dict[str, Any] = {
        "caption_hashes": hashes_bk[:, 0] if has_one_caption else hashes_bk,
        "image_ids": torch.tensor([row.image_id for row in rows]),
        "captions": [row.captions[0].text for row in rows],
        "keys": [row.key for row in rows],
        "broken": [row.broken for row in rows if row.broken],
        "retries": [take_retries()],  # of the process that loaded these rows
    }
    if rows[0].pixels is not None:
        pixels = [row.pixels for row in rows if row.pixels is not None]
        batch["pixels"] = torch.from_numpy(np.stack(pixels))
        shapes = [row.shape for row in rows if row.shape is not None]
        if shapes:
            batch["spatial_shapes"] = torch.tensor(shapes)  # (b, 2)
    for name in ("embeddings", "targets"):
        values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        if values:
            values_bkW = torch.stack(values)
            batch[name] = values_bkW[:, 0] if has_one_caption else values_bkW
    return batch


# Errors of loader processes as they were raised: torch would put the process's traceback in front
# of the message.


class CollatedDataset(Dataset):
    """Batches of what ``read`` gives, with the ``seconds`` that took; a ValueError or OSError in
    place of one, with LLM2CLIP_TRACEBACK=1 to torch. For a DataLoader whose ``collate_fn`` is
    ``as_it_is``; ``raised`` raises the errors.
    """

    def __init__(
        self, read: Callable[[Any], Any], collate: Callable[[list[Any]], dict[str, Any]]
    ) -> None:
        self.read = read
        self.collate = collate

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        started = time.perf_counter()
        try:
            batch = self.collate([self.read(index) for index in indices])
            return batch | {"seconds": [time.perf_counter() - started]}
        except (ValueError, OSError) as error:
            if os.environ.get("LLM2CLIP_TRACEBACK") == "1":
                raise
            return error


def as_it_is(batch: Any) -> Any:
    """A collate function for batches that are collated already."""
    return batch


def raised(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; an error among them is raised."""
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def leave_signals_to_the_run(worker: int) -> None:
    """In a loader process: keep loading for GRACE seconds after SIGTERM, and ignore Ctrl-C.

    Launchers send SIGTERM, and terminals SIGINT, to loader processes too. torch's handler would end
    them at once, and the run could not finish its step, save and stop. SIGTERM is not ignored: at
    exit, torch waits for these processes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))


@dataclass(eq=False)
class EvalPairs:
    """Batches of a source's images, each once, in order, prepared as by the tower's own
    preprocessor.

    A batch: pixels (b, S, S, 3) uint8, for images.Normalize; spatial_shapes (b, 2) int64 if native
    (images.as_square); image_ids (b,) int64 (number in the source), embeddings (m, W) float32
    (absent without a cache), owners (m,) int64: the image_ids of the captions' images, captions (m
    Caption), keys and meta (b). A sample that is broken or has no selected caption is left out and
    listed in ``broken``.
    """

    source: Source
    cache: EmbeddingCache | None
    images: ImageConfig
    _: KW_ONLY
    batch: int  # images
    # only captions of these kinds; empty: all; None: also images without captions
    kinds: Sequence[str] | None = ()
    languages: Sequence[str] = ()  # only captions in these languages; empty: all
    indices: Sequence[int] | None = None  # samples of the source; None: all
    rank: int = 0
    world: int = 1  # each rank gets consecutive samples of its own
    workers: int = 0  # loader processes; the batches don't depend on it
    broken: list[BrokenSample] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.indices is None:
            chosen = np.arange(len(self.source))
        else:
            chosen = np.asarray(self.indices, dtype=np.int64)
        mine = np.array_split(chosen, self.world)[self.rank].tolist()
        self._batches = [
            mine[start : start + self.batch] for start in range(0, len(mine), self.batch)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.broken = []
        workers = min(self.workers, -(-sum(map(len, self._batches)) // SMALL_PART))
        width = cache_width([self.cache])
        plan = plan_evaluation(self.batch, workers, self.images.size, width)
        part_indices: list[list[int]] = []
        for indices in self._batches:
            for start in range(0, len(indices), plan.part):
                part_indices.append(indices[start : start + plan.part])
        loader = DataLoader(
            CollatedDataset(self._read, self._collate),
            batch_sampler=part_indices,
            num_workers=workers,
            collate_fn=as_it_is,
            prefetch_factor=plan.prefetch if workers else None,
            worker_init_fn=leave_signals_to_the_run,
        )
        parts = raised(loader)
        for indices in self._batches:
            count = -(-len(indices) // plan.part)
            batch = joined(list(islice(parts, count)))
            self.broken += batch.pop("broken")
            del batch["seconds"]
            if batch["keys"]:
                yield batch

    def _read(self, index: int) -> Row | BrokenSample:
        shard, within = self.source.locate(index)
        try:
            sample = self.source[index]
            captions = select_captions(sample.captions, self.kinds or (), self.languages)
            if not captions and self.kinds is not None:
                reason = "no caption"
                if sample.captions:
                    reason += f" of kinds {self.kinds} and languages {self.languages}"
                return BrokenSample(shard, sample.key, reason)
            pixels = evaluation_pixels(sample.read_image(), self.images)
            pixels, shape = as_square(pixels, self.images)
        except BrokenSample as error:
            return error
        except BrokenImage as error:
            return BrokenSample(shard, sample.key, str(error))
        embeddings = None
        if self.cache is not None:
            embeddings = self.cache.rows(shard, within, captions, key=sample.key)
        return Row(pixels, captions, embeddings, None, index, sample.key, (), sample.meta, shape)

    def _collate(self, items: list[Row | BrokenSample]) -> dict[str, Any]:
        good = [item for item in items if isinstance(item, Row)]
        side = self.images.size
        all_pixels = [item.pixels for item in good if item.pixels is not None]
        pixels = np.stack(all_pixels) if all_pixels else np.zeros((0, side, side, 3), np.uint8)
        captions: list[Caption] = []
        owners: list[int] = []
        for item in good:
            captions += item.captions
            owners += [item.image_id] * len(item.captions)
        batch: dict[str, Any] = {
            "pixels": torch.from_numpy(pixels),
            "image_ids": torch.tensor([item.image_id for item in good], dtype=torch.int64),
            "owners": torch.tensor(owners, dtype=torch.int64),
            "captions": captions,
            "keys": [item.key for item in good],
            "meta": [item.meta for item in good],
            "broken": [item for item in items if isinstance(item, BrokenSample)],
        }
        if self.images.fit == "native":
            shapes = torch.tensor([item.shape for item in good], dtype=torch.int64)
            batch["spatial_shapes"] = shapes.reshape(-1, 2)
        embeddings = [item.embeddings for item in good if item.embeddings is not None]
        if self.cache is not None:
            batch["embeddings"] = torch.cat([torch.empty(0, self.cache.width), *embeddings])
        return batch


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of its parts, in order."""
    if len(parts) == 1:
        return parts[0]
    batch: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if isinstance(values[0], torch.Tensor):
            batch[name] = torch.cat(values)
        else:
            batch[name] = list(chain.from_iterable(values))
    return batch


# Training batches. Loader processes hand over parts of a batch, images as bytes; images.Normalize
# converts them where they are used. Rows of a global batch are a function of (seed, position),
# whatever the number of workers and ranks.

log = logging.getLogger(__name__)

Batch = dict[str, Any]  # tensors and lists, one entry a row

LISTED = 20  # broken samples in an error
LEAST_ROWS = 1000  # of which a fraction is broken, so that one early sample can't stop a run
SHUTDOWN = 10  # seconds that closing waits for the thread
_too_large: set[str] = set()  # sources whose windows don't fit into their ``cache_gb``, said once


@dataclass(eq=False)
class PairLoader:
    """Endless batches of one rank from ``position`` on. Counts broken samples.

    A batch: pixels (b, S, S, 3) uint8, for images.Normalize; spatial_shapes (b, 2) int64 if native
    (images.as_square); embeddings (b, W) float32 (absent without caches), caption_hashes and
    image_ids (b,) int64, captions and keys lists of b texts (with k captions an image, embeddings
    (b, k, W), caption_hashes (b, k), captions the first), position: pairs consumed after this
    batch, retries: reads that this rank has repeated so far, images_per_second: that one process
    reads. With ``workers`` the next batch is put together in a thread while the caller uses this
    one. Iterating raises ValueError when more than ``max_broken`` of this rank's samples are
    broken.
    """

    dataset: PairDataset
    _: KW_ONLY
    local_batch: int  # pairs of one rank in a batch
    micro_batch: int = 0  # pairs that a part of a batch has at most; 0: local_batch
    position: int = 0  # pairs that all ranks have consumed so far
    rank: int = 0
    world: int = 1
    # that the ranks are on, as many on each; the first of a node downloads its shards ahead
    nodes: int = 1
    workers: int = 0  # loader processes; the batches don't depend on it
    # 10^6 bytes of shared memory that the loader processes fill ahead
    prefetch_mb: float = PREFETCH_MB
    max_broken: float = 0.01  # fraction of broken samples above which the run stops
    pin_memory: bool = False  # batches in page-locked memory, for copies to a GPU that don't wait
    rows: int = field(default=0, init=False)  # loaded
    substituted: int = field(default=0, init=False)  # of these, rows that replace a broken sample
    # reads of data that were repeated after a transient error
    retries: int = field(default=0, init=False)
    # seconds that all processes together took for the rows
    reading: float = field(default=0.0, init=False)
    # (shard, key) -> reason
    broken: dict[tuple[str, str], str] = field(default_factory=dict, init=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        plan = plan_loading(
            rows=self.local_batch,
            micro_batch=self.micro_batch or self.local_batch,
            workers=self.workers,
            row_bytes=self.dataset.row_bytes,
            prefetch_mb=self.prefetch_mb,
        )
        loader = DataLoader(
            CollatedDataset(self.dataset.__getitem__, collate),
            # endless, so it has no length
            batch_sampler=self._draws(plan.part),  # pyright: ignore[reportArgumentType]
            num_workers=self.workers,
            collate_fn=as_it_is,
            prefetch_factor=plan.prefetch if self.workers else None,
            worker_init_fn=leave_signals_to_the_run,
        )
        closed = threading.Event()
        # the loader processes start here
        parts = raised(takewhile(lambda part: not closed.is_set(), iter(loader)))
        batches = join_parts(parts, self.local_batch, pin_memory=self.pin_memory)
        if self.workers:
            device = torch.cuda.current_device() if self.pin_memory else None
            batches = made_ahead(batches, closed, device=device)
        del parts  # the thread alone holds the loader processes, and ends them
        with closing(batches):
            for number, batch in enumerate(batches, start=1):
                self._count(len(batch["keys"]), batch.pop("broken"))
                self.retries += sum(batch.pop("retries"))
                self.reading += sum(batch.pop("seconds"))
                position = self.position + number * self.local_batch * self.world
                rate = self.rows / self.reading
                yield {
                    **batch,
                    "position": position,
                    "retries": self.retries,
                    "images_per_second": rate,
                }

    def _draws(self, part: int) -> Iterator[list[Draw]]:
        """Endless draws of this rank, in parts of a batch: each belongs to one batch."""
        mixture = self.dataset.mixture()
        position = self.position
        batch = self.local_batch * self.world
        node, rank_of_node = divmod(self.rank, self.world // self.nodes)
        sources = enumerate(self.dataset.sources) if rank_of_node == 0 else ()
        remote = {
            number: source
            for number, source in sources
            if mixture.windows[number] and source.downloads_shards
        }
        fetched: dict[int, list[int]] = {}  # source -> shards of its next window
        while True:
            for number, source in remote.items():
                window, following = mixture.window_shards(number, position, node, self.nodes, batch)
                if fetched.get(number) != following:
                    fetched[number] = following
                    download_ahead(source, window, following)
            draws = mixture.rank_draws(position, self.rank, self.local_batch, self.world)
            for start in range(0, self.local_batch, part):
                yield draws[start : start + part]
            position += batch

    def _count(self, rows: int, broken: list[tuple[BrokenSample, ...]]) -> None:
        self.rows += rows
        self.substituted += len(broken)
        for error in chain.from_iterable(broken):
            if (error.shard, error.key) not in self.broken:
                self.broken[error.shard, error.key] = error.reason
                log.warning("broken: %s; replaced by another sample", error)
        total = max(self.rows, min(len(self.dataset), LEAST_ROWS))
        if self.substituted > self.max_broken * total:
            listed = [
                f"  shard {shard!r}, sample {key!r}: {why}"
                for (shard, key), why in self.broken.items()
            ]
            lines = "\n".join(listed[:LISTED])
            raise ValueError(
                f"{self.substituted} of {total} samples are broken, "
                f"more than max_broken {self.max_broken:g} allows:\n{lines}\n"
                "run `llm2clip data check DATA` to list them, then fix the data or raise max_broken"
            )


def join_parts(
    parts: Iterable[Batch], rows: int, *, pin_memory: bool
) -> Generator[Batch, None, None]:
    """Batches of ``rows`` rows in memory of this process, so that the parts' shared memory is free
    at once.

    A batch has one part or more, in order.
    """
    batch: Batch = {}
    filled = 0
    for part in parts:
        size = len(part["keys"])
        assert filled + size <= rows, "a part of two batches"
        for name, value in part.items():
            if isinstance(value, Tensor):
                if not filled:
                    batch[name] = torch.empty(
                        (rows, *value.shape[1:]), dtype=value.dtype, pin_memory=pin_memory
                    )
                batch[name][filled : filled + size] = value
            else:
                batch[name] = [*batch.get(name, ()), *value]
        filled += size
        if filled == rows:
            yield batch
            batch = {}
            filled = 0


def made_ahead(
    items: Iterator[Batch], closed: threading.Event, *, device: int | None
) -> Generator[Batch, None, None]:
    """Items of an iterator, the next one made in a thread while the caller uses the last one.

    An exception in ``items`` is raised where its item would have come. closed: set when the caller
    is done; ``items`` must then end. device: the GPU that memory is pinned for.
    """
    ready: queue.SimpleQueue[tuple[Batch, BaseException | None]] = queue.SimpleQueue()
    wanted = threading.Semaphore(1)

    def run() -> None:
        nonlocal items
        try:
            # of this thread: copies must not take the training step's cores
            torch.set_num_threads(1)
            if device is not None:
                # of this thread: pinning would open a context on GPU 0 otherwise
                torch.cuda.set_device(device)
            while wanted.acquire() and not closed.is_set():
                ready.put((next(items), None))
        except BaseException as error:  # StopIteration, too: the caller waits for one or the other
            ready.put(({}, error))
        items = iter(())  # frees the loader processes

    thread = threading.Thread(target=run, name="llm2clip-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            wanted.release()
            yield item
    finally:
        closed.set()
        wanted.release()
        if threading.current_thread() is not thread:  # a garbage collection may run there
            thread.join(SHUTDOWN)  # unless it hangs in a read


def download_ahead(source: Source, window: list[int], following: list[int]) -> None:
    """Download the next window of shards in a thread, while one is read.

    If both don't fit into ``cache_gb`` that would evict what is being read: a warning is logged
    instead.
    """
    need = sum(source.stamps[shard][0] for shard in {*window, *following})
    limit = source.config.cache_gb * 1e9
    if 0 < limit < need:
        if source.path not in _too_large:
            log.warning(
                "%s: two windows of shards have %.1f GB, so training waits at the end of each; "
                "raise cache_gb or lower shuffle_window",
                source.path,
                need / 1e9,
            )
        _too_large.add(source.path)
        return

    def download() -> None:
        try:
            for shard in following:
                source.use_shard(shard, Path.stat)
        except (OSError, ValueError) as error:
            # whoever reads the shard meets it again, and stops the run
            log.warning("shards could not be downloaded ahead: %s", error)

    threading.Thread(target=download, name="shards-ahead", daemon=True).start()
