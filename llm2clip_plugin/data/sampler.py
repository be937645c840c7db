"""The order of samples: a pure function of the seed and the number of samples consumed.

Every source is sampled without replacement, pass after pass. The global batch at a position doesn't
depend on the number of ranks, batches or workers, so one integer resumes a run with any number of
ranks: each takes its rows of the global batch (``rank_rows``), or, of shards that are read in
windows, the rows of its lanes (``Mixture.rank_draws``).
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# Hashes and permutations that are the same on every platform: what the order of samples is made of.

FEISTEL_ROUNDS = 6
# Shifts and factors of splitmix64's finalizer: each bit of the result depends on each bit of the
# value
MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 0))


def hash_words(*words: int | str) -> int:
    """64-bit hash of all ``words``, the same on every platform and version."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Permutation:
    """A permutation of 0 .. n-1 that is computed, not stored: a Feistel network, walked until it
    lands below n. The network permutes 4^b numbers, 4^b >= n > 4^(b-1), so a walk takes less than 4
    steps on average."""

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        bits = max(n - 1, 1).bit_length()  # of the largest number, at least 1
        self.half = (bits + 1) // 2  # bits of one half of a number
        self.round_keys: list[np.uint64] = []
        for number in range(FEISTEL_ROUNDS):
            self.round_keys.append(np.uint64(hash_words("round", key, n, number)))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Images of int64 ``positions`` (k,), each within 0 .. n-1; (k,) int64."""
        values = self._network(positions.astype(np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while len(outside):
            walked = self._network(values[outside])
            values[outside] = walked
            outside = outside[walked >= self.n]
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        half = np.uint64(self.half)
        mask = np.uint64((1 << self.half) - 1)
        left = values >> half
        right = values & mask
        spare = np.empty_like(right)
        for key in self.round_keys:
            mixed = right + key
            for shift, factor in MIXING:
                np.right_shift(mixed, np.uint64(shift), out=spare)
                mixed ^= spare
                if factor:
                    mixed *= np.uint64(factor)
            mixed &= mask
            mixed ^= left
            left = right
            right = mixed
        left <<= half
        left |= right
        return left


# Which source each draw of an epoch, or each global batch, comes from: computed where it is needed,
# never stored.

# draws computed at once: fewer calls, and arrays that a processor's cache still holds
BLOCK = 1 << 16


class SourceOrder:
    """The sources of an epoch's draws, in mixed order: draw i is of the source that owns number
    permutation(i).

    Source s owns as many of the numbers 0 .. length-1 as it has draws. How many draws of each
    source come before a position has no closed form: they are counted from the last position, or
    from the epoch's beginning or end, if that is nearer. So while a run reads on, only the draws
    between its batches are counted.
    """

    def __init__(self, draws: Sequence[int], key: int) -> None:
        self.stops = np.cumsum(np.asarray(draws, dtype=np.int64))
        self.length = int(self.stops[-1])
        self.permute = Permutation(self.length, key)
        self._ends = {
            0: np.zeros(len(draws), dtype=np.int64),
            self.length: np.asarray(draws, dtype=np.int64),
        }
        self._last = dict(self._ends)

    def __call__(self, offset: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each of ``count`` draws from ``offset`` on, and how many of that source's come
        before it."""
        stop = offset + count
        before = self.counts(offset)
        labels = np.concatenate(list(self._labels(offset, stop)))
        ranks = np.empty(count, dtype=np.int64)
        for source in np.unique(labels).tolist():
            here = labels == source
            ranks[here] = before[source] + np.arange(int(np.count_nonzero(here)))
        self._last = {stop: before + np.bincount(labels, minlength=len(before))}
        return labels, ranks

    def counts(self, offset: int) -> np.ndarray:
        """(sources,) int64: draws of each source before ``offset``."""
        counts_at = self._ends | self._last
        nearest = min(counts_at, key=lambda start: abs(start - offset))
        counts = counts_at[nearest].copy()
        if nearest < offset:
            for labels in self._labels(nearest, offset):
                counts += np.bincount(labels, minlength=len(counts))
        else:
            for labels in self._labels(offset, nearest):
                counts -= np.bincount(labels, minlength=len(counts))
        self._last = {offset: counts}
        return counts

    def _labels(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Sources of the draws start .. stop-1, in blocks."""
        for first in range(start, stop, BLOCK):
            draws = np.arange(first, min(first + BLOCK, stop))
            yield np.searchsorted(self.stops, self.permute(draws), side="right")


class BatchOrder:
    """The sources of global batches that each come from one source, in mixed order.

    After e epochs a source with d draws an epoch has had floor(e d / batch) batches: what an epoch
    leaves of less than a batch is carried over to the next epoch, so no sample is dropped.
    """

    def __init__(self, draws: Sequence[int], batch: int, seed: int) -> None:
        self.draws = list(draws)
        self.batch = batch
        self.seed = seed
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __call__(self, step: int) -> tuple[int, list[int]]:
        """Source of a batch, and how many batches of each source come before it since the start of
        training."""
        epoch = step * self.batch // sum(self.draws)
        while sum(self._before(epoch + 1)) <= step:
            epoch += 1
        in_earlier_epochs = self._before(epoch)
        offset = step - sum(in_earlier_epochs)  # within the epoch
        order = self._order(epoch)
        labels, _ = order(offset, 1)
        in_epoch = order.counts(offset).tolist()
        before = [sum(pair) for pair in zip(in_earlier_epochs, in_epoch, strict=True)]
        return int(labels[0]), before

    def _before(self, epoch: int) -> list[int]:
        """Batches of each source in the epochs before ``epoch``."""
        return [epoch * draws // self.batch for draws in self.draws]

    def _make_order(self, epoch: int) -> SourceOrder:
        starts = self._before(epoch)
        stops = self._before(epoch + 1)
        batches = [stop - start for start, stop in zip(starts, stops, strict=True)]
        return SourceOrder(batches, hash_words("batches", self.seed, epoch))


class Draw(NamedTuple):
    """One sample of a batch."""

    source: int  # number of the source
    index: int  # number of the sample in it
    epoch: int  # completed passes over the source


def sample_rng(seed: int, epoch: int, source: int, index: int) -> random.Random:
    """Random generator of one sample in one pass (augmentation, choice of caption), whichever
    process loads it."""
    return random.Random(hash_words("sample", seed, epoch, source, index))


LANES = 64  # parts of a window of shards, each with as many rows of a global batch
LANE_SAMPLES = 64  # that a lane has at least: smaller windows are shuffled as a whole


class PassOrder:
    """The order of one pass over one source, which begins at place ``first`` of its endless passes.

    ``window`` 0 shuffles the entire source. Otherwise the shards are shuffled and cut into groups
    of ``window``, so a disk or shard cache serves ``window`` shards at a time. A group's samples,
    shard after shard, are cut into LANES parts of equal size, each shuffled; place p of the passes
    is of lane p mod LANES. So a global batch takes as many rows of each lane, and a node that takes
    the rows of some lanes reads their shards alone.
    """

    def __init__(
        self, shard_sizes: Sequence[int], window: int, key: int, first: int = 0
    ) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.key = key
        self.first = first
        shards = np.arange(len(self.sizes))
        if window == 0 or window >= len(shards):
            self.groups = [shards]
        else:
            permute = Permutation(len(shards), hash_words("shards", key))
            shuffled = permute(shards)
            starts = range(0, len(shards), window)
            self.groups = [shuffled[start : start + window] for start in starts]
        self.lanes = LANES if window else 1
        self.shard_starts = np.cumsum(self.sizes) - self.sizes
        group_sizes = np.array([self.sizes[group].sum() for group in self.groups])
        self.group_stops = np.cumsum(group_sizes)
        self.group_starts = self.group_stops - group_sizes

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers (k,) at int64 ``positions`` (k,) of the pass."""
        group_of = np.searchsorted(self.group_stops, positions, side="right")
        result = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(group_of):
            here = group_of == number
            shards = self.groups[number]
            sizes = self.sizes[shards]
            in_group = positions[here] - self.group_starts[number]
            within = self._shuffled(int(number), int(sizes.sum()), in_group)
            stops = np.cumsum(sizes)
            starts = stops - sizes
            nth_shard = np.searchsorted(stops, within, side="right")
            in_shard = within - starts[nth_shard]
            result[here] = self.shard_starts[shards[nth_shard]] + in_shard
        return result

    def share(self, group: np.ndarray, node: int, nodes: int, more: int) -> list[int]:
        """The shards of a group that a node's lanes, also those that it shares, and ``more`` on
        both sides are in."""
        stops = np.cumsum(self.sizes[group])
        starts = stops - self.sizes[group]
        samples = int(stops[-1])
        first_lane = node * LANES // nodes - more
        stop_lane = -(-(node + 1) * LANES // nodes) + more  # rounded up
        first = samples * first_lane // LANES
        stop = samples * stop_lane // LANES
        return group[(stops > first) & (starts < stop)].tolist()

    def _shuffled(self, group: int, size: int, positions: np.ndarray) -> np.ndarray:
        """Which of a group's ``size`` samples, shard after shard, are at these positions of the
        group."""
        lanes = self.lanes if size >= LANES * LANE_SAMPLES else 1
        # of a lane; of those that come first in this group, one more, which is the last
        rows = size // lanes
        lane_of_first = (self.first + int(self.group_starts[group])) % lanes
        numbers = np.arange(lanes)
        has_one_more = (numbers - lane_of_first) % lanes < size % lanes
        stops = np.cumsum(np.where(has_one_more, rows + 1, rows))
        starts = np.concatenate([[0], stops[:-1]])
        lane = (positions + lane_of_first) % lanes
        row = positions // lanes
        whole = np.minimum(row, rows - 1)
        permute = Permutation(rows, hash_words("samples", self.key, group))
        # lanes share a permutation, and begin at different places of it
        moved = permute((whole + lane * (rows // lanes)) % rows)
        return starts[lane] + np.where(row < rows, moved, row)


class Mixture:
    """Draws from several sources. An epoch holds round(weight x size) draws of each source, in
    mixed order.

    With all weights 1 an epoch is every sample once. An epoch makes two passes over a source of
    weight 2 and half a pass over one of weight 0.5; the next epoch continues that pass, so sampling
    stays without replacement. With ``batch`` every global batch is drawn from one source, and
    sources have their share of batches (see BatchOrder).
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int]],  # samples of each shard of each source
        weights: Sequence[float],
        seed: int,
        windows: Sequence[int] = (),  # shuffle_window of each source; () is 0 for all
        # samples of a global batch, all of one source; 0: a batch mixes the sources
        batch: int = 0,
    ) -> None:
        self.shard_sizes = [tuple(sizes) for sizes in shard_sizes]
        self.lengths = [sum(sizes) for sizes in self.shard_sizes]
        empty = [number for number, length in enumerate(self.lengths) if length == 0]
        if empty:
            raise ValueError(f"sources at index {empty} contain no samples")
        self.seed = seed
        self.windows = list(windows) or [0] * len(weights)
        self.draws = epoch_draws(self.lengths, weights)
        self._pass_order = lru_cache(maxsize=4 * len(weights))(self._make_pass_order)
        self._source_order = lru_cache(maxsize=2)(self._make_source_order)
        self._batches: BatchOrder | None = None
        if batch and len(weights) > 1:
            self._batches = BatchOrder(self.draws, batch, seed)

    @property
    def epoch_length(self) -> int:
        """Samples drawn in one epoch."""
        return sum(self.draws)

    def batch_indices(self, position: int, count: int) -> list[Draw]:
        """The ``count`` draws from ``position`` (samples consumed since training began) on."""
        return self._draws(*self._batch_places(position, count))

    def _batch_places(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources (k,), and places (k,) of each source's endless passes, of the draws from
        ``position`` on."""
        period = self.epoch_length if self._batches is None else self._batches.batch
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        stop = position + count
        while position < stop:
            number, offset = divmod(position, period)
            here = min(stop - position, period - offset)
            parts.append(self._places(number, offset, here))
            position += here
        labels, places = zip(*parts, strict=True)
        return np.concatenate(labels), np.concatenate(places)

    def rank_draws(
        self, position: int, rank: int, local: int, world: int
    ) -> list[Draw]:
        """The ``local`` draws of a rank of the global batch at ``position``.

        Of sources that are read in windows, ranks take the rows of their lanes: a node reads its
        share of the shards.
        """
        if not any(self.windows):
            return self.batch_indices(*rank_rows(position, rank, local))
        batch = local * world
        labels, places = self._batch_places(position, batch)
        has_lanes = np.asarray(self.windows)[labels] > 0
        in_order = np.arange(batch) * LANES // batch
        lanes = np.where(has_lanes, places % LANES, in_order)
        by_lane = np.argsort(lanes, kind="stable")
        rows = by_lane[rank * local : (rank + 1) * local]
        return self._draws(labels[rows], places[rows])

    def window_shards(
        self, source: int, start: int, node: int, nodes: int, batch: int
    ) -> tuple[list[int], list[int]]:
        """A node's shards of a source's window that the draws from ``start`` on read, and of the
        window after it; all if a global ``batch`` has fewer rows of the source than there are
        lanes."""
        number, position = divmod(self._drawn(source, start), self.lengths[source])
        order = self._pass_order(source, number)
        window = int(np.searchsorted(order.group_stops, position, side="right"))
        if window + 1 < len(order.groups):
            following = order.groups[window + 1]
        else:
            following = self._pass_order(source, number + 1).groups[0]
        rows = batch  # of the source in a global batch
        more = 0  # lanes on both sides
        if len(self.draws) > 1 and self._batches is None:
            rows = batch * self.draws[source] // self.epoch_length
            more = 1  # the number of rows varies from batch to batch
        if rows < LANES:
            more = LANES
        current_shards = order.share(order.groups[window], node, nodes, more)
        return current_shards, order.share(following, node, nodes, more)

    def _drawn(self, source: int, start: int) -> int:
        """How many draws of a source come before position ``start``."""
        if len(self.draws) == 1:
            return start
        if self._batches is None:
            epoch, offset = divmod(start, self.epoch_length)
            in_epoch = int(self._source_order(epoch).counts(offset)[source])
            return epoch * self.draws[source] + in_epoch
        step, offset = divmod(start, self._batches.batch)
        current, before = self._batches(step)
        drawn = before[source] * self._batches.batch
        if current == source:
            drawn += offset
        return drawn

    def _draws(self, labels: np.ndarray, places: np.ndarray) -> list[Draw]:
        """Draws of these sources (k,), at these places (k,) of each source's endless passes."""
        result: list[Draw] = [Draw(0, 0, 0)] * len(labels)
        for source in np.unique(labels).tolist():
            here = np.flatnonzero(labels == source)
            passes, within = np.divmod(places[here], self.lengths[source])
            for number in np.unique(passes).tolist():
                in_pass = passes == number
                order = self._pass_order(source, number)
                rows = here[in_pass].tolist()
                indices = order(within[in_pass]).tolist()
                for row, index in zip(rows, indices, strict=True):
                    result[row] = Draw(source, index, number)
        return result

    def _places(
        self, number: int, offset: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Source and place of draws within epoch ``number``, or within global batch ``number`` of
        one source."""
        if self._batches is not None:
            source, before = self._batches(number)
            start = before[source] * self._batches.batch + offset
            places = np.arange(start, start + count, dtype=np.int64)
            return np.full(count, source), places
        if len(self.draws) == 1:
            start = number * self.draws[0] + offset
            places = np.arange(start, start + count, dtype=np.int64)
            return np.zeros(count, dtype=np.int64), places
        labels, ranks = self._source_order(number)(offset, count)
        draws_before = number * np.asarray(self.draws)[labels]
        return labels, draws_before + ranks

    def _make_source_order(self, epoch: int) -> SourceOrder:
        return SourceOrder(self.draws, hash_words("mix", self.seed, epoch))

    def _make_pass_order(self, source: int, number: int) -> PassOrder:
        key = hash_words("pass", self.seed, source, number)
        first = number * self.lengths[source]
        return PassOrder(self.shard_sizes[source], self.windows[source], key, first)


def epoch_draws(lengths: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Draws of each source in one epoch of a mixture, from the sources' numbers of samples and
    weights."""
    draws: list[int] = []
    for weight, length in zip(weights, lengths, strict=True):
        draws.append(max(1, round(weight * length)))
    return draws


def rank_rows(position: int, rank: int, local: int) -> tuple[int, int]:
    """Position and count of the rows of ``rank`` in the global batch at ``position``."""
    return position + rank * local, local
