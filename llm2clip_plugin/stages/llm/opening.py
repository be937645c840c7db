"""Stage 1's input: pairs of captions, surveyed before the LLM is loaded."""

from dataclasses import dataclass

from llm2clip_plugin.data.digest import short_digest
from llm2clip_plugin.data.sampler import epoch_draws
from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.pair_batches import PairBatches
from llm2clip_plugin.text.pair_loader import PairTokenizer
from llm2clip_plugin.text.pairs import Survey, open_pairs, survey


@dataclass(frozen=True, kw_only=True)
class Data:
    """The pairs of a run."""

    surveys: tuple[Survey, ...]  # one for each source
    samples: int  # pairs of an epoch
    batches: PairBatches  # of one rank

    @property
    def digests(self) -> dict[str, str]:
        """What is compared between ranks: the number of samples, and the texts of the first ones."""
        return {
            str(number): f"{len(source)} samples ({short_digest([[p.query, p.positive] for p in result.pairs])})"
            for number, (source, result) in enumerate(zip(self.batches.sources, self.surveys, strict=True), 1)
        }

    def lines(self) -> list[str]:
        """The surveys' findings."""
        return [line for result in self.surveys for line in result.lines()]


def open_data(config: FinetuneConfig, rank: int, world: int) -> Data:
    """Open and survey every data set. Raises FileNotFoundError or ValueError for one that is missing or too small."""
    sources = open_pairs(config.pairs)
    batches = PairBatches(
        sources,
        config.pairs.weights,
        seed=config.train.seed,
        global_batch=config.train.global_batch,
        rank=rank,
        world=world,
        mix_kinds=config.pairs.mix_kinds,
    )
    samples = sum(epoch_draws(list(map(len, sources)), config.pairs.weights or [1.0] * len(sources)))
    return Data(surveys=tuple(survey(source, config.pairs) for source in sources), samples=samples, batches=batches)


def count_truncated(result: Survey, encoder: CaptionEncoder, *, cut_queries: bool) -> str:
    """How many of a survey's texts will be truncated to max_tokens, as a line; "" if none.

    Raises ValueError for a truncated query unless ``cut_queries``: a query's end is its caption, which would be lost.
    """
    limit = encoder.config.max_tokens
    frames = PairTokenizer(encoder).query_frames(result.pairs)
    queries = encoder.lengths([pair.query for pair in result.pairs], frames)
    long = [(length, pair.key) for length, pair in zip(queries, result.pairs, strict=True) if length > limit]
    if long and not cut_queries:
        length, key = max(long)
        raise ValueError(
            f"{result.path}: {len(long)} of the first {len(queries)} queries are longer than max_tokens {limit}, the "
            f"longest {length} (sample {key!r}); raise --max-tokens, or truncate them with --cut-queries"
        )
    texts = [pair.positive for pair in result.pairs]
    positives = sum(length > limit for length in encoder.lengths(texts, [encoder.frame] * len(texts)))
    if not long and not positives:
        return ""
    return (
        f"{result.path}: of the first {len(queries)} pairs {len(long)} queries and {positives} positives are "
        f"truncated to {limit} tokens"
    )
