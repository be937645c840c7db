"""Batches of pairs: which samples, in what order, and their tokens, read ahead by processes.

A batch is drawn from one source and, from a caption set, with one kind of pair (short and long,
say), so that its negatives are alike. The order is a function of (seed, samples consumed), as in
data.sampler.
"""

import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from llm2clip_plugin.data.sampler import (
    Draw,
    Mixture,
    hash_words,
    rank_rows,
    sample_rng,
)
from llm2clip_plugin.data.samples import caption_hash
from llm2clip_plugin.data.workers import leave_signals_to_the_run
from llm2clip_plugin.text.config import EncoderConfig, PairKind, PairsConfig
from llm2clip_plugin.text.frames import Frame, build_frame, tokenize
from llm2clip_plugin.text.llm import literal_template
from llm2clip_plugin.text.pairs import CaptionPairs, Pair, open_pairs

SUBSTITUTES = 100  # samples tried in place of one without a pair of the batch's kind
PREFETCH = 2  # batches that each process reads ahead


class PairBatches:
    """``batch(position)`` gives this rank's rows of the global batch that starts there."""

    def __init__(
        self,
        config: PairsConfig,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
    ) -> None:
        """Raises as ``open_pairs``; ValueError for a source that is smaller than a batch."""
        self.sources = open_pairs(config)
        self.mix_kinds = config.mix_kinds
        self.seed = seed
        self.global_batch = global_batch
        self.rank = rank
        self.world = world
        sizes = [source.sizes for source in self.sources]
        weights = config.weights or [1.0] * len(self.sources)
        self.mixture = Mixture(
            sizes, weights, hash_words("pairs", seed, 0), batch=global_batch
        )
        small: list[str] = []
        for source in self.sources:
            if len(source) < global_batch:
                small.append(f"{source.path} ({len(source)} samples)")
        if small:
            raise ValueError(
                f"--global-batch {global_batch} is larger than {', '.join(small)}, and a batch has "
                "one source; lower --global-batch"
            )

    def batch(self, position: int) -> dict[str, Any]:
        """``pairs``, ``keys``, ``caption_hashes`` (2, b) of positives and queries, ``image_ids``
        (b,), ``position``."""
        step, rest = divmod(position, self.global_batch)
        assert rest == 0, f"position {position} is not at a batch's start"
        first, count = rank_rows(position, self.rank, self.global_batch // self.world)
        draws = self.mixture.batch_indices(first, count)
        number = draws[0].source
        kinds = self.sources[number].kinds
        kind = choose_kind(kinds, self.seed, step)
        pairs: list[Pair] = []
        for draw in draws:
            if self.mix_kinds:
                kind = choose_kind(kinds, self.seed, *draw)
            pairs.append(self._pair(draw, kind))
        images = [hash_words(number, pair.group or pair.key) >> 1 for pair in pairs]
        positives = [caption_hash(pair.positive) for pair in pairs]
        queries = [caption_hash(pair.query) for pair in pairs]
        return {
            "pairs": pairs,
            "keys": [pair.key for pair in pairs],
            "caption_hashes": torch.tensor([positives, queries], dtype=torch.int64),
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
            if pair is None:
                continue
            if isinstance(source, CaptionPairs) and source.config.random_negatives:
                return source.with_negative(pair, kind, rng)
            return pair
        raise ValueError(
            f"{source.path}: no pair {kind} in {SUBSTITUTES} samples from number {draw.index} on"
        )


def choose_kind(kinds: Sequence[PairKind], *words: int) -> PairKind:
    """A kind drawn by weight, a function of ``words``."""
    rng = random.Random(hash_words("kind", *words))
    return rng.choices(list(kinds), [kind.weight for kind in kinds])[0]


class PairTokenizer:
    """Pairs to token ids, as an LLM with these settings reads them; without the LLM."""

    def __init__(self, tokenizer: Any, config: EncoderConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.template = literal_template(tokenizer, config.chat_template)

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, list[Any]]:
        """Token ids of the queries, the positives and, if the pairs have them, the hard negatives;
        queries' frames."""
        query_prompt = self.config.query_prompt
        prompt = self.config.prompt
        prompts = [
            query_prompt if pair.instruction is None else pair.instruction
            for pair in pairs
        ]
        frames = {
            text: build_frame(self.tokenizer, self.template, text)
            for text in {*prompts, prompt}
        }
        query_frames = [frames[text] for text in prompts]
        positive_frames = [frames[prompt]] * len(pairs)
        queries = [pair.query for pair in pairs]
        positives = [pair.positive for pair in pairs]
        tokens: dict[str, list[Any]] = {}
        tokens["query"] = self._tokenize(query_frames, queries)
        tokens["positive"] = self._tokenize(positive_frames, positives)
        if pairs[0].negative:
            negatives = [pair.negative for pair in pairs]
            tokens["negative"] = self._tokenize(positive_frames, negatives)
        tokens["query_frame"] = query_frames
        return tokens

    def _tokenize(
        self, frames: Sequence[Frame], texts: Sequence[str]
    ) -> list[list[int]]:
        """Token ids of each text in its frame."""
        rows, _ = tokenize(self.tokenizer, frames, texts, self.config.max_tokens)
        return rows


class TokenizedPairs(IterableDataset):
    """Endless batches of one rank from ``position`` on, with their ``tokens``; processes take
    turns."""

    def __init__(
        self, batches: PairBatches, tokenizer: PairTokenizer, position: int
    ) -> None:
        self.batches = batches
        self.tokenizer = tokenizer
        self.position = position

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        count = 1 if worker is None else worker.num_workers
        position = self.position + number * self.batches.global_batch
        while True:
            batch = self.batches.batch(position)
            yield {**batch, "tokens": self.tokenizer(batch["pairs"])}
            position += count * self.batches.global_batch


def tokenized_batches(
    batches: PairBatches, tokenizer: PairTokenizer, *, position: int, workers: int
) -> Iterator[dict[str, Any]]:
    """This rank's batches from ``position`` (samples consumed) on; the same for any number of
    ``workers``."""
    loader = DataLoader(
        TokenizedPairs(batches, tokenizer, position),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_start_worker,
    )
    return iter(loader)


def _start_worker(number: int) -> None:
    """The tokenizer's own threads would deadlock in a forked process, and each process is one of
    several already."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    leave_signals_to_the_run(number)
