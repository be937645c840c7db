"""Stage 1's batches read and tokenized in processes of their own, in the same order as without them."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from llm2clip_plugin.data.loader import leave_signals_to_the_run
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.pair_batches import PairBatches
from llm2clip_plugin.text.pairs import Pair
from llm2clip_plugin.text.tokens import Frame, query_frames, tokenize

PREFETCH = 2  # batches that each process reads ahead


class PairTokenizer:
    """What tokenizing needs of an encoder, without its LLM."""

    def __init__(self, encoder: CaptionEncoder) -> None:
        self.tokenizer = encoder.tokenizer
        self.frame, self.template = encoder.frame, encoder.config.chat_template
        self.query_prompt, self.max_tokens = encoder.config.query_prompt, encoder.config.max_tokens

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, list[Any]]:
        """Token ids of the queries, the positives and, if the pairs have them, the hard negatives; queries' frames."""
        query_frames, frames = self.query_frames(pairs), [self.frame] * len(pairs)
        rows: dict[str, list[Any]] = {
            "query": self._rows([pair.query for pair in pairs], query_frames),
            "query_frame": query_frames,
            "positive": self._rows([pair.positive for pair in pairs], frames),
        }
        if pairs[0].negative:
            rows["negative"] = self._rows([pair.negative for pair in pairs], frames)
        return rows

    def query_frames(self, pairs: Sequence[Pair]) -> list[Frame]:
        """What surrounds each query: its pair's instruction, or the encoder's query prompt."""
        prompts = [self.query_prompt if pair.instruction is None else pair.instruction for pair in pairs]
        return query_frames(self.tokenizer, self.template, prompts)

    def _rows(self, texts: Sequence[str], frames: Sequence[Frame]) -> list[list[int]]:
        return tokenize(self.tokenizer, frames, texts, self.max_tokens)[0]


class TokenizedPairs(IterableDataset):
    """Endless batches of one rank from ``position`` on, with their ``tokens``; processes take turns."""

    def __init__(self, batches: PairBatches, tokenizer: PairTokenizer, position: int) -> None:
        self.batches, self.tokenizer, self.position = batches, tokenizer, position

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        position = self.position + number * self.batches.global_batch
        while True:
            batch = self.batches.batch(position)
            yield {**batch, "tokens": self.tokenizer(batch["pairs"])}
            position += count * self.batches.global_batch


def tokenized_batches(batches: PairBatches, encoder: CaptionEncoder, *, position: int, workers: int) -> Iterator[Any]:
    """This rank's batches from ``position`` (samples consumed) on; the same for any number of ``workers``."""
    loader = DataLoader(
        TokenizedPairs(batches, PairTokenizer(encoder), position),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_start_worker,
    )
    return iter(loader)


def _start_worker(number: int) -> None:
    """The tokenizer's own threads would deadlock in a forked process, and each process is one of several already."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    leave_signals_to_the_run(number)
