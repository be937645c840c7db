"""Training batches: images, each with the teacher's embedding of one of its captions.

Loader processes hand over parts of a batch (data.parts), images as bytes; images.Normalize converts them where they
are used.

Shapes: b images of a batch on one rank, S pixels a side, W width of a teacher embedding, m captions.

The rows of a global batch are a function of (seed, position), whatever the number of workers and ranks. A sample that
can't be used is reported, counted and replaced by another, which is a function of (seed, sample).
"""

import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llm2clip_plugin.data.augment import AugmentConfig, TrainTransform
from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.caption_choice import choose_captions
from llm2clip_plugin.data.decode import BrokenImage
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.parts import Ahead, PartDraws, join_parts
from llm2clip_plugin.data.permutation import hash_words
from llm2clip_plugin.data.read_rate import shuffle_window
from llm2clip_plugin.data.retry import take_retries
from llm2clip_plugin.data.sampler import Draw, Mixture, sample_rng
from llm2clip_plugin.data.shards_ahead import ShardsAhead
from llm2clip_plugin.data.shared_memory import PREFETCH_MB, LoadPlan, plan_loading, row_bytes
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import BrokenSample, Caption, caption_hash, select_captions
from llm2clip_plugin.data.worker_errors import Guarded, GuardedCollate, raised

log = logging.getLogger(__name__)

SUBSTITUTES = 20  # samples tried in place of a broken one
GRACE = 60  # seconds that a loader process outlives SIGTERM
SOURCE_BITS = 40  # an image's id is (source << 40) + sample; more samples than any source has


@dataclass(frozen=True)
class Row:
    """One image of a batch with k of its captions."""

    pixels: np.ndarray  # (S, S, 3) uint8
    captions: tuple[Caption, ...]
    embeddings: torch.Tensor | None  # (k, W) float32; None without a cache
    image_id: int
    shard: str
    key: str
    broken: tuple[BrokenSample, ...]  # the samples that this row replaces


class PairDataset(Dataset):
    """The row of a draw: augmented image and one of its selected captions, a function of (seed, pass, sample)."""

    def __init__(
        self,
        sources: Sequence[Source],
        caches: Sequence[EmbeddingCache | None],
        images: ImageConfig,
        augment: AugmentConfig | None = None,
        *,
        seed: int,
        caption_weights: Mapping[str, float] | None = None,
        captions_per_image: int = 1,
    ) -> None:
        """caption_weights: how often each kind of caption is drawn; without, captions are drawn evenly.

        captions_per_image: captions k of a row; an image that has fewer repeats them.
        """
        if len(sources) != len(caches):
            raise ValueError(f"{len(sources)} sources but {len(caches)} embedding caches; pass one per source")
        if len({cache.width for cache in caches if cache is not None}) > 1:
            widths = {source.path: cache.width for source, cache in zip(sources, caches, strict=True) if cache}
            raise ValueError(f"embedding caches differ in width: {widths}; embed all sources with the same teacher")
        self.sources = list(sources)
        self.caches = list(caches)
        self.seed = seed
        self.caption_weights = dict(caption_weights or {})
        self.captions_per_image = captions_per_image
        self.transform = TrainTransform(images, augment)

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's image and embeddings."""
        width = next((cache.width for cache in self.caches if cache is not None), 0)
        return row_bytes(self.transform.config.size, width * self.captions_per_image)

    def mixture(self) -> Mixture:
        """The order in which samples of these sources are drawn."""
        paths = [source.path for source in self.sources]
        return Mixture(
            [[shard.size for shard in source.shards] for source in self.sources],
            [source.config.weight for source in self.sources],
            self.seed,
            [shuffle_window(source.config.shuffle_window, paths) for source in self.sources],
        )

    def __getitem__(self, draw: Draw) -> Row:
        """Raises ValueError if a sample and all of its substitutes are broken."""
        broken: list[BrokenSample] = []
        length = len(self.sources[draw.source])
        for attempt in range(SUBSTITUTES + 1):
            index = draw.index
            if attempt:
                index = hash_words("substitute", self.seed, draw.epoch, draw.source, draw.index, attempt) % length
            try:
                return self._row(Draw(draw.source, index, draw.epoch), tuple(broken))
            except BrokenSample as error:
                broken.append(error)
        listed = "\n".join(f"  {error}" for error in broken)
        raise ValueError(f"{len(broken)} consecutive samples of {self.sources[draw.source].path} are broken:\n{listed}")

    def _row(self, draw: Draw, broken: tuple[BrokenSample, ...]) -> Row:
        source, cache = self.sources[draw.source], self.caches[draw.source]
        shard, within = source.locate(draw.index)
        sample = source.with_image(draw.index)
        kinds = source.config.kinds or tuple(self.caption_weights)
        captions = select_captions(sample.captions, kinds, source.config.languages)
        if not captions:
            raise BrokenSample(shard, sample.key, _no_caption(source, sample.captions, kinds))
        rng = sample_rng(self.seed, draw.epoch, draw.source, draw.index)
        chosen = choose_captions(captions, self.caption_weights, self.captions_per_image, rng)
        try:
            image = sample.read_image()
            if cache is not None:
                cache.check_image(shard, within, sample.key, image)
            pixels = self.transform.pixels(image, rng)
        except BrokenImage as error:
            raise BrokenSample(shard, sample.key, str(error)) from error
        embeddings = None if cache is None else cache.rows(shard, within, chosen, key=sample.key)
        image_id = (draw.source << SOURCE_BITS) + draw.index
        return Row(pixels, chosen, embeddings, image_id, shard, sample.key, broken)


def _no_caption(source: Source, captions: tuple[Caption, ...], kinds: Sequence[str]) -> str:
    if not captions:
        return f"no caption in the fields {', '.join(field.name for field in source.fields)}"
    known = ", ".join(sorted({f"{caption.kind}:{caption.language}" for caption in captions}))
    return f"no caption of kinds {tuple(kinds)} and languages {source.config.languages}; available: {known}"


def collate(rows: list[Row]) -> dict[str, Any]:
    """Rows to tensors and lists; with one caption an image, its hash and embedding have no axis for it."""
    hashes_bk = torch.tensor([[caption_hash(caption.text) for caption in row.captions] for row in rows])
    one = hashes_bk.shape[1] == 1
    batch: dict[str, Any] = {
        "pixels": torch.from_numpy(np.stack([row.pixels for row in rows])),
        "caption_hashes": hashes_bk[:, 0] if one else hashes_bk,
        "image_ids": torch.tensor([row.image_id for row in rows]),
        "captions": [row.captions[0].text for row in rows],
        "keys": [row.key for row in rows],
        "shards": [row.shard for row in rows],
        "broken": [row.broken for row in rows if row.broken],
        "retries": [take_retries()],  # of the process that loaded these rows
    }
    if rows[0].embeddings is not None:
        embeddings_bkW = torch.stack([row.embeddings for row in rows if row.embeddings is not None])
        batch["embeddings"] = embeddings_bkW[:, 0] if one else embeddings_bkW
    return batch


class PairLoader:
    """Endless batches of one rank. Counts broken samples and stops above the allowed fraction."""

    def __init__(
        self,
        loader: DataLoader,
        plan: LoadPlan,
        *,
        position: int,
        global_batch: int,
        samples: int,
        max_broken: float,
        pin_memory: bool,
    ) -> None:
        self._loader = loader
        self.plan = plan
        self._position = position
        self._global_batch = global_batch
        self._pin_memory = pin_memory
        # the fraction is of at least this many rows, so one early sample can't stop a run
        self._least_rows = min(samples, 1000)
        self.max_broken = max_broken
        self.rows = 0  # rows loaded
        self.substituted = 0  # of these, rows that replace a broken sample
        self.retries = 0  # reads of data that were repeated after an error that passes
        self.broken: dict[tuple[str, str], str] = {}  # (shard, key) -> reason
        self._ahead: Callable[[], Ahead | None] = lambda: None  # weak references: see __iter__
        self._processes: Callable[[], Any] = lambda: None

    def queue(self) -> tuple[float, float]:
        """Batches that are ready, and that there is space for: one put together, the others in parts.

        (0, 0) without loader processes.
        """
        if not self.plan.workers:
            return 0.0, 0.0
        ahead, processes = self._ahead(), self._processes()
        parts = 0
        if processes is not None:  # torch has no public way to ask
            early = sum(len(task) > 1 for task in list(processes._task_info.values()))
            parts = early + processes._data_queue.qsize()
        in_parts = self.plan.part / self.plan.rows
        space = 1 + self.plan.workers * self.plan.prefetch * in_parts
        return (ahead.ready if ahead else 0) + parts * in_parts, space

    def __iter__(self) -> Iterator[dict[str, Any]]:
        closed = threading.Event()
        processes = iter(self._loader)  # the loader processes start here
        parts = raised(takewhile(lambda part: not closed.is_set(), processes))
        batches = join_parts(parts, self.plan.rows, pin_memory=self._pin_memory)
        if not self.plan.workers:
            yield from self._finished(batches)
            return
        ahead = Ahead(batches, closed, device=torch.cuda.current_device() if self._pin_memory else None)
        self._ahead, self._processes = weakref.ref(ahead), weakref.ref(processes)
        del processes, parts, batches  # the thread alone holds the loader processes, and ends them
        try:
            yield from self._finished(ahead)
        finally:
            ahead.close()
            # the thread's last exception refers to the thread's frame, so `ahead` lives until it is collected
            self._ahead = self._processes = lambda: None

    def _finished(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Batches whose broken samples and retries are counted, each with the position after it."""
        try:
            for number, batch in enumerate(batches, start=1):
                self._count(len(batch["keys"]), batch.pop("broken"))
                self.retries += sum(batch.pop("retries"))
                yield {**batch, "position": self._position + number * self._global_batch, "retries": self.retries}
        finally:
            if self.retries:
                log.warning("retried %d reads of data while loading %d rows", self.retries, self.rows)

    def _count(self, rows: int, broken: list[tuple[BrokenSample, ...]]) -> None:
        self.rows += rows
        self.substituted += len(broken)
        for error in (error for errors in broken for error in errors):
            if (error.shard, error.key) not in self.broken:
                self.broken[error.shard, error.key] = error.reason
                log.warning("broken: %s; replaced by another sample", error)
        if self.substituted > self.max_broken * max(self.rows, self._least_rows):
            listed = [f"  shard {shard!r}, sample {key!r}: {why}" for (shard, key), why in self.broken.items()]
            more = [f"  ... and {len(listed) - 20} more"] if len(listed) > 20 else []
            raise ValueError(
                f"{self.substituted} of {max(self.rows, self._least_rows)} samples are broken, more than max_broken "
                f"{self.max_broken:g} allows:\n"
                + "\n".join(listed[:20] + more)
                + "\nrun `llm2clip data check DATA` to list them, then fix the data or raise max_broken"
            )


def leave_signals_to_the_run(worker: int) -> None:
    """In a loader process: keep loading for GRACE seconds after SIGTERM, and ignore Ctrl-C.

    Launchers send SIGTERM, and terminals SIGINT, to loader processes too. torch's handler would end them at once, and
    the run could not finish its step, save and stop. SIGTERM is not ignored: at exit, torch waits for these processes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))


def make_loader(
    dataset: PairDataset,
    *,
    local_batch: int,  # pairs of one rank in a batch
    micro_batch: int = 0,  # pairs that a part of a batch has at most; 0: local_batch
    position: int = 0,  # pairs that all ranks have consumed so far
    rank: int = 0,
    world: int = 1,
    workers: int = 0,  # loader processes; the batches don't depend on it
    prefetch_mb: float = PREFETCH_MB,  # 10^6 bytes of shared memory that the loader processes fill ahead
    max_broken: float = 0.01,  # fraction of broken samples above which the run stops
    pin_memory: bool = False,
    whole_shards: bool = False,  # this machine reads all samples: fetch the next window of a network file system
) -> PairLoader:
    """Endless batches from ``position`` on.

    A batch: pixels (b, S, S, 3) uint8, for images.Normalize; embeddings (b, W) float32 (absent without caches),
    caption_hashes and image_ids (b,) int64, captions, keys and shards lists of b texts (with k captions an image,
    embeddings (b, k, W), caption_hashes (b, k), captions the first), position: pairs consumed after this
    batch, retries: reads that this rank has repeated so far. With ``workers`` the next batch is put together in a
    thread while the caller uses this one.
    ``pin_memory``: in page-locked memory, for copies to a GPU that don't wait.
    Iterating raises ValueError when more than ``max_broken`` of this rank's samples are broken.
    """
    plan = plan_loading(
        rows=local_batch,
        micro_batch=micro_batch or local_batch,
        workers=workers,
        row_bytes=dataset.row_bytes,
        prefetch_mb=prefetch_mb,
    )
    mixture = dataset.mixture()
    ahead = ShardsAhead(mixture, dataset.sources, whole=whole_shards)
    draws = PartDraws(mixture, position, rank, world, local_batch, plan.part, ahead)
    loader = DataLoader(
        Guarded(dataset),
        batch_sampler=draws,  # pyright: ignore[reportArgumentType] - endless, so it has no length
        num_workers=workers,
        collate_fn=GuardedCollate(collate),
        prefetch_factor=plan.prefetch if workers else None,
        worker_init_fn=leave_signals_to_the_run,
    )
    return PairLoader(
        loader,
        plan,
        position=position,
        global_batch=local_batch * world,
        samples=len(dataset),
        max_broken=max_broken,
        pin_memory=pin_memory,
    )
