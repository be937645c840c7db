"""Global batches of pairs, a function of (seed, samples consumed), and each rank's rows of them."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from llm2clip_plugin.data.permutation import hash_words
from llm2clip_plugin.data.sampler import Mixture, rank_rows, sample_rng
from llm2clip_plugin.data.sources.records import caption_hash
from llm2clip_plugin.text.pairs import Pair, PairKind, PairSource

SUBSTITUTES = 100  # samples tried in place of one without a pair of the batch's kind


class PairBatches:
    """``batch(position)`` gives this rank's rows of the global batch that starts there."""

    def __init__(
        self,
        sources: Sequence[PairSource],
        weights: Sequence[float],
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
    ) -> None:
        self.sources = list(sources)
        self.seed = seed
        self.global_batch = global_batch
        self.rank, self.world = rank, world
        self.shares = [w * len(s) for s, w in zip(sources, weights or [1.0] * len(sources), strict=True)]
        self.orders = [
            Mixture([source.sizes()], [1.0], hash_words("pairs", seed, number)) for number, source in enumerate(sources)
        ]
        self._sources_so_far: list[int] = []  # source of each global batch from the start of training
        small = [f"{source.path} ({len(source)})" for source in sources if len(source) < global_batch]
        if small:
            raise ValueError(
                f"global_batch {global_batch} is larger than {', '.join(small)}; lower it, a batch has one source"
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.start(0)

    def start(self, position: int) -> Iterator[dict[str, Any]]:
        """This rank's endless batches from ``position`` (samples consumed) on."""
        while True:
            yield self.batch(position)
            position += self.global_batch

    def batch(self, position: int) -> dict[str, Any]:
        """``pairs``, ``keys``, ``caption_hashes`` (2, b) of positives and queries, ``image_ids`` (b,), ``position``."""
        step, rest = divmod(position, self.global_batch)
        assert rest == 0, f"position {position} is not at a batch's start"
        number = self._source_of(step)
        source = self.sources[number]
        earlier = self._sources_so_far[:step].count(number)
        kind = self._choose(source.kinds, [kind.weight for kind in source.kinds], "kind", step)
        start, count = rank_rows(earlier * self.global_batch, self.rank, self.global_batch // self.world)
        draws = self.orders[number].batch_indices(start, count)
        pairs = [self._pair(number, draw.index, draw.epoch, kind) for draw in draws]
        images = [hash_words(number, pair.group or pair.key) >> 1 for pair in pairs]
        texts = [[caption_hash(pair.positive) for pair in pairs], [caption_hash(pair.query) for pair in pairs]]
        return {
            "pairs": pairs,
            "keys": [pair.key for pair in pairs],
            "caption_hashes": torch.tensor(texts, dtype=torch.int64),
            "image_ids": torch.tensor(images, dtype=torch.int64),
            "position": position + self.global_batch,
        }

    def _pair(self, number: int, index: int, epoch: int, kind: PairKind) -> Pair:
        """The pair of a draw; a sample without one is replaced by the next sample with one."""
        source = self.sources[number]
        for offset in range(min(SUBSTITUTES, len(source))):
            chosen = (index + offset) % len(source)
            pair = source.pair(chosen, kind, sample_rng(self.seed, epoch, number, chosen))
            if pair is not None:
                return pair
        raise ValueError(f"{source.path}: no pair {kind} in {SUBSTITUTES} samples from number {index} on")

    def _source_of(self, step: int) -> int:
        """The source of a global batch: drawn by weight x size, the same on every rank."""
        while len(self._sources_so_far) <= step:
            drawn = self._choose(range(len(self.sources)), self.shares, "source", len(self._sources_so_far))
            self._sources_so_far.append(drawn)
        return self._sources_so_far[step]

    def _choose(self, items: Sequence[Any], weights: Sequence[float], what: str, step: int) -> Any:
        rng = random.Random(hash_words(what, self.seed, step))
        return rng.choices(list(items), list(weights))[0]
