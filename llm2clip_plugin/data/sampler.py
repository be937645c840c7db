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
    return int.from_bytes(
        hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "little"
    )


class Permutation:
    """A permutation of 0 .. n-1 that is computed, not stored: a Feistel network, walked until it
    lands below n. The network permutes 4^b numbers, 4^b >= n > 4^(b-1), so a walk takes less than 4
    steps on average."""

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        self.half = max(
            1, (max(n - 1, 1).bit_length() + 1) // 2
        )  # bits of one half of a number
        self.round_keys = [
            np.uint64(hash_words("round", key, n, number))
            for number in range(FEISTEL_ROUNDS)
        ]

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
        before = self.counts(offset)
        labels = np.concatenate([*self._labels(offset, offset + count)])
        ranks = np.empty(count, dtype=np.int64)
        for source in np.unique(labels).tolist():
            here = labels == source
            ranks[here] = before[source] + np.arange(int(np.count_nonzero(here)))
        self._last = {
            offset + count: before + np.bincount(labels, minlength=len(before))
        }
        return labels, ranks

    def counts(self, offset: int) -> np.ndarray:
        """(sources,) int64: draws of each source before ``offset``."""
        counts_at = self._ends | self._last
        nearest = min(counts_at, key=lambda start: abs(start - offset))
        counts = counts_at[nearest].copy()
        for labels in self._labels(min(nearest, offset), max(nearest, offset)):
            counts += np.bincount(labels, minlength=len(counts)) * (
                1 if nearest < offset else -1
            )
        self._last = {offset: counts}
        return counts

    def _labels(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Sources of the draws start .. stop-1, in blocks."""
        for first in range(start, stop, BLOCK):
            yield np.searchsorted(
                self.stops,
                self.permute(np.arange(first, min(first + BLOCK, stop))),
                side="right",
            )


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
        before = self._before(epoch)
        labels, _ = self._order(epoch)(step - sum(before), 1)
        counts = self._order(epoch).counts(step - sum(before)).tolist()
        return int(labels[0]), [
            earlier + here for earlier, here in zip(before, counts, strict=True)
        ]

    def _before(self, epoch: int) -> list[int]:
        """Batches of each source in the epochs before ``epoch``."""
        return [epoch * draws // self.batch for draws in self.draws]

    def _make_order(self, epoch: int) -> SourceOrder:
        batches = [
            after - before
            for before, after in zip(
                self._before(epoch), self._before(epoch + 1), strict=True
            )
        ]
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
        if window == 0 or window >= len(self.sizes):
            self.groups = [np.arange(len(self.sizes))]
        else:
            order = Permutation(len(self.sizes), hash_words("shards", key))(
                np.arange(len(self.sizes))
            )
            self.groups = [
                order[first : first + window] for first in range(0, len(order), window)
            ]
        self.lanes = LANES if window else 1
        self.shard_starts = np.cumsum(self.sizes) - self.sizes
        group_sizes = np.array(
            [int(self.sizes[group].sum()) for group in self.groups], dtype=np.int64
        )
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
            within = self._shuffled(
                int(number),
                int(sizes.sum()),
                positions[here] - self.group_starts[number],
            )
            stops = np.cumsum(sizes)
            shard = np.searchsorted(stops, within, side="right")
            result[here] = (
                self.shard_starts[shards[shard]] + within - (stops - sizes)[shard]
            )
        return result

    def share(self, group: np.ndarray, node: int, nodes: int, more: int) -> list[int]:
        """The shards of a group that a node's lanes, also those that it shares, and ``more`` on
        both sides are in."""
        stops = np.cumsum(self.sizes[group])
        lanes = np.array(
            [node * LANES // nodes - more, -(-(node + 1) * LANES // nodes) + more]
        )
        first, last = int(stops[-1]) * lanes // LANES
        return group[(stops > first) & (stops - self.sizes[group] < last)].tolist()

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
        moved = Permutation(rows, hash_words("samples", self.key, group))(
            (whole + lane * (rows // lanes)) % rows
        )
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
        if empty := [
            number for number, length in enumerate(self.lengths) if length == 0
        ]:
            raise ValueError(f"sources at index {empty} contain no samples")
        self.seed = seed
        self.windows = list(windows) or [0] * len(weights)
        self.draws = epoch_draws(self.lengths, weights)
        self._pass_order = lru_cache(maxsize=4 * len(weights))(self._make_pass_order)
        self._source_order = lru_cache(maxsize=2)(
            lambda epoch: SourceOrder(self.draws, hash_words("mix", seed, epoch))
        )
        self._batches = (
            BatchOrder(self.draws, batch, seed) if batch and len(weights) > 1 else None
        )

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
        labels, places = self._batch_places(position, local * world)
        in_order = np.arange(local * world) * LANES // (local * world)
        lanes = np.where(np.asarray(self.windows)[labels] > 0, places % LANES, in_order)
        rows = np.argsort(lanes, kind="stable")[rank * local : (rank + 1) * local]
        return self._draws(labels[rows], places[rows])

    def window_shards(
        self, source: int, start: int, node: int, nodes: int, batch: int
    ) -> tuple[list[int], list[int]]:
        """A node's shards of a source's window that the draws from ``start`` on read, and of the
        window after it; all if a global ``batch`` has fewer rows of the source than there are
        lanes."""
        if len(self.draws) == 1:
            drawn = start
        elif self._batches is None:
            epoch, offset = divmod(start, self.epoch_length)
            drawn = epoch * self.draws[source] + int(
                self._source_order(epoch).counts(offset)[source]
            )
        else:
            step, offset = divmod(start, self._batches.batch)
            current, before = self._batches(step)
            drawn = before[source] * self._batches.batch + (
                offset if current == source else 0
            )
        number, position = divmod(drawn, self.lengths[source])
        order = self._pass_order(source, number)
        window = int(np.searchsorted(order.group_stops, position, side="right"))
        following = [*order.groups, self._pass_order(source, number + 1).groups[0]][
            window + 1
        ]
        # how many rows a source has in a batch varies
        is_mixed = len(self.draws) > 1 and self._batches is None
        rows = batch * self.draws[source] // self.epoch_length if is_mixed else batch
        more = LANES if rows < LANES else int(is_mixed)
        return order.share(order.groups[window], node, nodes, more), order.share(
            following, node, nodes, more
        )

    def _draws(self, labels: np.ndarray, places: np.ndarray) -> list[Draw]:
        """Draws of these sources (k,), at these places (k,) of each source's endless passes."""
        result: list[Draw] = [Draw(0, 0, 0)] * len(labels)
        for source in np.unique(labels).tolist():
            here = np.flatnonzero(labels == source)
            passes, within = np.divmod(places[here], self.lengths[source])
            for number in np.unique(passes).tolist():
                chosen = here[passes == number]
                indices = self._pass_order(source, number)(within[passes == number])
                for row, index in zip(chosen.tolist(), indices.tolist(), strict=True):
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
            return np.full(count, source), np.arange(
                start, start + count, dtype=np.int64
            )
        if len(self.draws) == 1:
            start = number * self.draws[0] + offset
            return np.zeros(count, dtype=np.int64), np.arange(
                start, start + count, dtype=np.int64
            )
        labels, ranks = self._source_order(number)(offset, count)
        return labels, number * np.asarray(self.draws)[labels] + ranks

    def _make_pass_order(self, source: int, number: int) -> PassOrder:
        key = hash_words("pass", self.seed, source, number)
        return PassOrder(
            self.shard_sizes[source],
            self.windows[source],
            key,
            number * self.lengths[source],
        )


def epoch_draws(lengths: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Draws of each source in one epoch of a mixture, from the sources' numbers of samples and
    weights."""
    return [
        max(1, round(weight * length))
        for weight, length in zip(weights, lengths, strict=True)
    ]


def rank_rows(position: int, rank: int, local: int) -> tuple[int, int]:
    """Position and count of the rows of ``rank`` in the global batch at ``position``."""
    return position + rank * local, local
