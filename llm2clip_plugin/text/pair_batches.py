"""Global batches of pairs, a function of (seed, samples consumed), and each rank's rows of them."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from llm2clip_plugin.data.permutation import hash_words
from llm2clip_plugin.data.sampler import Draw, Mixture, rank_rows, sample_rng
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
        mix_kinds: bool = False,
    ) -> None:
        """weights: how often a sample of each source is drawn; () for all equal.

        mix_kinds: each pair has a kind of its own, instead of one of the batch.
        """
        self.sources = list(sources)
        self.seed = seed
        self.global_batch = global_batch
        self.rank, self.world = rank, world
        self.mix_kinds = mix_kinds
        sizes = [source.sizes() for source in sources]
        self.mixture = Mixture(sizes, weights or [1.0] * len(sources), hash_words("pairs", seed, 0), batch=global_batch)
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
        draws = self.mixture.batch_indices(*rank_rows(position, self.rank, self.global_batch // self.world))
        number = draws[0].source
        kinds = self.sources[number].kinds
        kind_of_batch = choose_kind(kinds, self.seed, step)
        pairs = [
            self._pair(draw, choose_kind(kinds, self.seed, *draw) if self.mix_kinds else kind_of_batch)
            for draw in draws
        ]
        images = [hash_words(number, pair.group or pair.key) >> 1 for pair in pairs]
        texts = [[caption_hash(pair.positive) for pair in pairs], [caption_hash(pair.query) for pair in pairs]]
        return {
            "pairs": pairs,
            "keys": [pair.key for pair in pairs],
            "caption_hashes": torch.tensor(texts, dtype=torch.int64),
            "image_ids": torch.tensor(images, dtype=torch.int64),
            "position": position + self.global_batch,
        }

    def _pair(self, draw: Draw, kind: PairKind) -> Pair:
        """The pair of a draw; a sample without one is replaced by the next sample with one."""
        source = self.sources[draw.source]
        for offset in range(min(SUBSTITUTES, len(source))):
            chosen = (draw.index + offset) % len(source)
            rng = sample_rng(self.seed, draw.epoch, draw.source, chosen)
            pair = source.pair(chosen, kind, rng)
            if pair is not None:
                return source.with_negative(pair, kind, rng)
        raise ValueError(f"{source.path}: no pair {kind} in {SUBSTITUTES} samples from number {draw.index} on")


def choose_kind(kinds: Sequence[PairKind], *words: int) -> PairKind:
    """A kind drawn by weight, a function of ``words``."""
    rng = random.Random(hash_words("kind", *words))
    return rng.choices(list(kinds), [kind.weight for kind in kinds])[0]
