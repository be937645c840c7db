"""Pairs of texts for caption-contrastive training: two captions of one image, or rows of a text-pair file.

A batch is drawn from one source and, from a caption set, with one kind of pair (short and long, say), so that its
negatives are alike. The order is a function of (seed, samples consumed), as in data.sampler.
"""

import dataclasses
import json
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_plugin.data.sampler import sample_rng
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import check_fields, open_source
from llm2clip_plugin.data.sources.records import BrokenSample, Caption, select_captions
from llm2clip_plugin.outside.values import refuse_encoding
from llm2clip_plugin.text.config import PairKind, PairsConfig, parse_instructions, parse_kinds, parse_lists

SURVEYED = 5000  # samples read before training, to detect a wrong configuration
NEGATIVES_TRIED = 100  # random images in which a negative is searched


@dataclass(frozen=True)
class Pair:
    """Two texts with the same meaning, and optionally a hard negative."""

    key: str
    query: str
    positive: str
    negative: str = ""
    group: str = ""  # pairs of one group are not used as negatives of each other
    instruction: str | None = None  # text before the query; None: the encoder's query prompt


class PairSource(ABC):
    """Samples that pairs are made of."""

    def __init__(self, path: str, kinds: tuple[PairKind, ...]) -> None:
        self.path = path
        self.kinds = kinds

    @abstractmethod
    def sizes(self) -> list[int]:
        """Samples of each shard."""

    @abstractmethod
    def pair(self, number: int, kind: PairKind, rng: random.Random) -> Pair | None:
        """A pair of one sample, chosen by ``rng``; None if it has none of this kind."""

    def with_negative(self, pair: Pair, kind: PairKind, rng: random.Random) -> Pair:
        """The pair with the hard negative that the configuration adds, chosen by ``rng``."""
        return pair

    def __len__(self) -> int:
        return sum(self.sizes())


class CaptionPairs(PairSource):
    """Two captions of one image."""

    def __init__(self, source: Source, config: PairsConfig) -> None:
        super().__init__(source.path, parse_kinds(config.pair_kinds))
        self.source = source
        self.lists = parse_lists(config.lists)
        self.instructions = parse_instructions(config.instructions)
        self.random_negatives = config.random_negatives
        self.group = config.group

    def sizes(self) -> list[int]:
        return [shard.size for shard in self.source.shards]

    def pair(self, number: int, kind: PairKind, rng: random.Random) -> Pair | None:
        try:
            sample = self.source[number]
        except BrokenSample:
            return None
        captions = select_captions(sample.captions, self.source.config.kinds, self.source.config.languages)
        query = self._text(captions, kind.query, rng, "")
        positive = self._text(captions, kind.of_positive, rng, query)
        if not query or not positive:
            return None
        group = str(sample.meta.get(self.group, "")) if self.group else ""
        return Pair(sample.key, query, positive, group=group, instruction=self.instructions.get(kind.query))

    def with_negative(self, pair: Pair, kind: PairKind, rng: random.Random) -> Pair:
        """Adds a caption of the positive's kind, of a random image of another key and group.

        Raises ValueError if NEGATIVES_TRIED random images have none.
        """
        if not self.random_negatives:
            return pair
        for _ in range(NEGATIVES_TRIED):
            other = self.pair(rng.randrange(len(self)), kind, rng)
            if other is None or other.key == pair.key or (pair.group and other.group == pair.group):
                continue
            if other.positive not in (pair.query, pair.positive):
                return dataclasses.replace(pair, negative=other.positive)
        raise ValueError(
            f"{self.path}: {NEGATIVES_TRIED} random images have no {kind.of_positive} caption for a negative of sample "
            f"{pair.key!r}; leave out --random-negatives"
        )

    def _text(self, captions: Sequence[Caption], kind: str, rng: random.Random, other: str) -> str:
        """A caption of a kind other than the text ``other``; "" if there is none."""
        texts = [caption.text for caption in select_captions(captions, (kind,)) if caption.text != other]
        if not texts:
            return ""
        text = rng.choice(texts)
        if kind not in self.lists:
            return text
        items = [item.strip() for item in text.split(",") if item.strip()]
        low, high = self.lists[kind]
        rng.shuffle(items)
        return ", ".join(items[: rng.randint(min(low, len(items)), min(high, len(items)))])


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers; ValueError if it is not UTF-8 or has none."""
    data = path.read_bytes()
    refuse_encoding(path, data)
    lines = data.decode("utf-8-sig", "replace").split("\n")
    rows = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} has no text")
    return rows


class TextPairs(PairSource):
    """Rows of a JSON Lines file: query, positive, and optionally a hard negative."""

    def __init__(self, path: Path, config: PairsConfig) -> None:
        super().__init__(str(path), (PairKind("query", "positive"),))
        self.fields = (config.query_field, config.positive_field, config.negative_field)
        self.instruction = config.instruction_field
        self.rows = read_lines(path)
        with_negative = [bool(self.read(index).negative) for index in range(len(self.rows))]
        if any(with_negative) and not all(with_negative):
            line = self.rows[with_negative.index(False)][0]
            raise ValueError(
                f"{path}, line {line}: no {self.fields[2]!r}, which other lines have; set it in all lines or in none"
            )

    def sizes(self) -> list[int]:
        return [len(self.rows)]

    def read(self, index: int) -> Pair:
        """A row. Raises ValueError naming the file, the line and the field."""
        line, data = self.rows[index]
        try:
            row = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}, line {line}: not valid JSON ({error})") from error
        texts = [first_text(row.get(name)) if isinstance(row, dict) else "" for name in self.fields]
        for name, text in zip(self.fields[:2], texts[:2], strict=True):
            if not text:
                has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise ValueError(f"{self.path}, line {line}: no text in field {name!r}; fields: {has}")
        instruction = row.get(self.instruction)
        return Pair(str(line), *texts, instruction=instruction if isinstance(instruction, str) else None)

    def pair(self, number: int, kind: PairKind, rng: random.Random) -> Pair | None:
        return self.read(number)


class PlainTexts(PairSource):
    """One text per line, paired with itself: dropout makes the two embeddings differ (SimCSE, Gao et al. 2021)."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), (PairKind("text", "text"),))
        self.texts = [line for _, line in read_lines(path)]

    def sizes(self) -> list[int]:
        return [len(self.texts)]

    def pair(self, number: int, kind: PairKind, rng: random.Random) -> Pair | None:
        return Pair(str(number), self.texts[number], self.texts[number])


def first_text(value: Any) -> str:
    """A text, or the first of a list of texts; "" for anything else."""
    if isinstance(value, list):
        value = value[0] if value else ""
    return value.strip() if isinstance(value, str) else ""


def open_pairs(config: PairsConfig) -> list[PairSource]:
    """Every data set of the configuration. Raises FileNotFoundError or ValueError, naming the data set."""
    if not config.data:
        raise ValueError("no training data; pass captions or text pairs: llm2clip finetune-llm DATA ...")
    opened = [_open(path, config) for path in config.data]
    check_fields(*(pairs.source for pairs in opened if isinstance(pairs, CaptionPairs)))
    return opened


def _open(path: str, config: PairsConfig) -> PairSource:
    kind = config.pair_format if config.pair_format != "auto" else _detect(path, config)
    if kind == "captions":
        return CaptionPairs(open_source(SourceConfig(path=path, **vars(config.read))), config)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no text pairs at {path}")
    return TextPairs(Path(path), config) if kind == "pairs" else PlainTexts(Path(path))


def _detect(path: str, config: PairsConfig) -> str:
    """text for .txt, pairs for a .jsonl whose first row has the query field, else captions."""
    if path.endswith(".txt"):
        return "text"
    if path.endswith(".jsonl") and Path(path).is_file():
        with open(path, encoding="utf-8", errors="replace") as file:  # JsonlSource names another encoding
            first = next((line for line in file if line.strip()), "{}")
        try:
            row = json.loads(first)
        except (ValueError, RecursionError):
            return "captions"
        return "pairs" if isinstance(row, dict) and config.query_field in row else "captions"
    return "captions"


@dataclass(frozen=True)
class Survey:
    """Statistics of a source's first samples."""

    path: str
    samples: int
    usable: dict[str, int]  # kind of pair -> samples that have one
    pairs: tuple[Pair, ...]  # of these samples

    def lines(self) -> Iterator[str]:
        """The report before training."""
        for kind, usable in self.usable.items():
            yield f"{self.path}: {usable} of the first {self.samples} samples have a pair {kind}"


def survey(source: PairSource, config: PairsConfig) -> Survey:
    """Read the first samples of a source. Raises ValueError if none of them has a pair of some kind."""
    samples = min(len(source), SURVEYED)
    usable: dict[str, int] = {}
    pairs: list[Pair] = []
    for kind in source.kinds:
        drawn = [source.pair(number, kind, sample_rng(0, 0, 0, number)) for number in range(samples)]
        of_kind = [pair for pair in drawn if pair is not None]
        if not of_kind:
            raise ValueError(_nothing_usable(source, kind, samples))
        usable[str(kind)] = len(of_kind)
        pairs += of_kind
    return Survey(source.path, samples, usable, tuple(pairs))


def _nothing_usable(source: PairSource, kind: PairKind, samples: int) -> str:
    """Why no sample has such a pair: the kinds of captions that they have."""
    kinds: Counter[str] = Counter()
    if isinstance(source, CaptionPairs):
        for number in range(samples):
            kinds.update({caption.kind for caption in source.source.captions(number)[1]})
    seen = ", ".join(f"{name} ({count})" for name, count in kinds.most_common()) or "none"
    return (
        f"{source.path}: none of the first {samples} samples has two different captions {kind}; kinds of captions "
        f"(samples with them): {seen}. Set --fields and --pair-kinds"
    )
