"""The pairs of captions that a run of stage 1 reads."""

import dataclasses
import sys

from llm2clip_plugin.data.cache import short_digest
from llm2clip_plugin.data.sampler import epoch_draws
from llm2clip_plugin.data.samples import count_broken
from llm2clip_plugin.outside import printable
from llm2clip_plugin.text.config import PairsConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.pair_batches import PairBatches, PairTokenizer
from llm2clip_plugin.text.pairs import Survey, survey
from llm2clip_plugin.train.config import TrainConfig
from llm2clip_plugin.train.distributed import rank


class LlmData:
    """The pairs of a run, and what the first samples of each source have."""

    def __init__(
        self, config: PairsConfig, train: TrainConfig, *, rank: int, world: int
    ) -> None:
        """Raises FileNotFoundError or ValueError for a data set that is missing, too small or
        without pairs."""
        self.batches = PairBatches(
            config,
            seed=train.seed,
            global_batch=train.global_batch,
            rank=rank,
            world=world,
        )
        sources = self.batches.sources
        weights = config.weights or [1.0] * len(sources)
        self.samples = sum(epoch_draws([*map(len, sources)], weights))  # of an epoch
        self.surveys = [survey(source) for source in sources]
        # what is compared between ranks: the number of samples, and the texts of the first ones
        self.digests: dict[str, str] = {}
        surveyed = zip(sources, self.surveys, strict=True)
        for number, (source, result) in enumerate(surveyed, 1):
            texts = [[pair.query, pair.positive] for pair in result.pairs]
            self.digests[str(number)] = f"{len(source)} samples ({short_digest(texts)})"
        self.lines: list[str] = []
        for result in self.surveys:
            first = f"the first {result.samples} samples"
            for kind, usable in result.usable.items():
                line = f"{result.path}: {usable} of {first} have a pair {kind}"
                self.lines.append(line)
            if result.broken:
                line = f"{result.path}: of {first}, {count_broken(result.broken)}"
                self.lines.append(printable(line))

    def captions(self) -> dict[str, str]:
        """A digest of each source's captions, all of them, which a checkpoint records."""
        digests: dict[str, str] = {}
        for number, source in enumerate(self.batches.sources, 1):
            digests[str(number)] = source.captions_digest()
        return digests

    @property
    def has_negatives(self) -> bool:
        """Whether a source has pairs with a hard negative."""
        return any(result.pairs[0].negative for result in self.surveys)


def count_truncated(
    result: Survey, encoder: CaptionEncoder, *, cut_queries: bool
) -> None:
    """Print how many of a survey's queries and positives will be truncated to max_tokens, on rank
    0.

    Raises ValueError for queries, unless ``cut_queries``: a query's end is its caption, which would
    be lost.
    """
    limit = encoder.config.max_tokens
    without_limit = dataclasses.replace(encoder.config, max_tokens=sys.maxsize)
    tokens = PairTokenizer(encoder.tokenizer, without_limit)(result.pairs)
    for side, plural in (("query", "queries"), ("positive", "positives")):
        too_long = [
            (len(ids), pair.key)
            for ids, pair in zip(tokens[side], result.pairs, strict=True)
            if len(ids) > limit
        ]
        first = f"the first {len(result.pairs)} {plural}"
        problem = f"{result.path}: {len(too_long)} of {first} are longer than max_tokens {limit}"
        if too_long and side == "query" and not cut_queries:
            length, key = max(too_long)
            raise ValueError(
                f"{problem}, the longest {length} (sample {key!r}); "
                "raise --max-tokens, or set --cut-queries"
            )
        if too_long and rank() == 0:
            print(f"{problem} and are truncated")
