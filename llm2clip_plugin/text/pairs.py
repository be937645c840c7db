"""Pairs for the caption-contrastive training of an LLM: two captions of an image, or rows of a
text-pair file.
"""

import dataclasses
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm2clip_plugin.data.cache import captions_digest, short_digest
from llm2clip_plugin.data.sampler import sample_rng
from llm2clip_plugin.data.samples import (
    BrokenSample,
    Caption,
    count_broken,
    select_captions,
)
from llm2clip_plugin.data.sources import Source, SourceConfig, check_fields, open_source
from llm2clip_plugin.outside import refuse_encoding
from llm2clip_plugin.text.config import PairKind, PairsConfig

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
    # text before the query; None: the encoder's query prompt
    instruction: str | None = None


class CaptionPairs:
    """Two captions of one image."""

    def __init__(self, source: Source, config: PairsConfig) -> None:
        self.source = source
        self.config = config
        self.path = source.path
        self.sizes = [shard.size for shard in source.shards]  # samples of each shard
        self.kinds = config.kinds
        self.drawn_items = config.drawn_items
        self.instruction_of = config.instruction_of

    def __len__(self) -> int:
        return sum(self.sizes)

    def captions_digest(self) -> str:
        """Over the captions of all samples."""
        return captions_digest(self.source)

    def pair(self, number: int, kind: PairKind, rng: random.Random) -> Pair | None:
        """A pair of one sample, chosen by ``rng``; None if it has none of this kind."""
        try:
            sample = self.source[number]
        except BrokenSample:
            return None
        captions = select_captions(
            sample.captions, self.source.config.kinds, self.source.config.languages
        )
        query = self._text(captions, kind.query, rng, "")
        positive = self._text(captions, kind.of_positive, rng, query)
        if not query or not positive:
            return None
        group = str(sample.meta.get(self.config.group, "")) if self.config.group else ""
        return Pair(
            sample.key,
            query,
            positive,
            group=group,
            instruction=self.instruction_of.get(kind.query),
        )

    def problem(self, number: int) -> BrokenSample | None:
        """Why a sample can't be read; None if it can."""
        try:
            self.source[number]
        except BrokenSample as error:
            return error
        return None

    def with_negative(self, pair: Pair, kind: PairKind, rng: random.Random) -> Pair:
        """Adds a caption of the positive's kind, of a random image of another key and group;
        ValueError without one."""
        for _ in range(NEGATIVES_TRIED):
            other = self.pair(rng.randrange(len(self)), kind, rng)
            if other is None or other.key == pair.key:
                continue
            if pair.group and other.group == pair.group:
                continue
            if other.positive not in (pair.query, pair.positive):
                return dataclasses.replace(pair, negative=other.positive)
        raise ValueError(
            f"{self.path}: {NEGATIVES_TRIED} random images have no negative for {pair.key!r}; "
            "omit --random-negatives"
        )

    def _text(
        self, captions: Sequence[Caption], kind: str, rng: random.Random, other: str
    ) -> str:
        """A caption of a kind other than the text ``other``; "" if there is none."""
        of_kind = select_captions(captions, (kind,))
        texts = [caption.text for caption in of_kind if caption.text != other]
        if not texts:
            return ""
        text = rng.choice(texts)
        if kind not in self.drawn_items:
            return text
        items = [item.strip() for item in text.split(",") if item.strip()]
        low, high = self.drawn_items[kind]
        rng.shuffle(items)
        count = rng.randint(min(low, len(items)), min(high, len(items)))
        return ", ".join(items[:count])


class TextPairs:
    """Rows of a JSON Lines file: query, positive, and optionally a hard negative and an
    instruction."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError naming the line for a row without a text, and for a negative that not
        all rows have."""
        data = path.read_bytes()
        refuse_encoding(path, data)
        lines = data.decode("utf-8-sig", "replace").split("\n")
        self.rows = [
            (number, line) for number, line in enumerate(lines, 1) if line.strip()
        ]
        self.path = str(path)
        self.kinds = (PairKind("query", "positive"),)
        self.sizes = [len(self.rows)]
        with_negative = [
            bool(self.read(index).negative) for index in range(len(self.rows))
        ]
        if any(with_negative) and not all(with_negative):
            line = self.rows[with_negative.index(False)][0]
            raise ValueError(
                f"{path}, line {line}: no 'negative', which other lines have; "
                "set it in all or in none"
            )

    def read(self, index: int) -> Pair:
        """A row. Raises ValueError naming the file, the line and the field."""
        line, data = self.rows[index]
        try:
            row = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.path}, line {line}: not valid JSON ({error})"
            ) from error
        texts: dict[str, str] = {}
        if isinstance(row, dict):
            texts = {name: text for name, text in row.items() if isinstance(text, str)}
        query = texts.get("query", "").strip()
        positive = texts.get("positive", "").strip()
        negative = texts.get("negative", "").strip()
        if not query or not positive:
            missing = "positive" if query else "query"
            raise ValueError(
                f"{self.path}, line {line}: no text in field {missing!r}; texts: {', '.join(texts)}"
            )
        return Pair(
            str(line), query, positive, negative, instruction=texts.get("instruction")
        )

    def captions_digest(self) -> str:
        """Over all rows."""
        return short_digest([line for _, line in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, number: int, kind: PairKind, rng: random.Random) -> Pair:
        return self.read(number)

    def problem(self, number: int) -> None:
        """All rows can be read."""


PairSource = CaptionPairs | TextPairs


def open_pairs(config: PairsConfig) -> list[PairSource]:
    """Every data set of the configuration. Raises FileNotFoundError or ValueError, naming the data
    set."""
    if not config.data:
        raise ValueError(
            "no training data; pass captions or text pairs: llm2clip finetune-llm DATA ..."
        )
    opened: list[PairSource] = []
    for path in config.data:
        if path.endswith(".jsonl") and Path(path).is_file() and _has_queries(path):
            opened.append(TextPairs(Path(path)))
        else:
            source = open_source(SourceConfig(path=path, **vars(config.read)))
            opened.append(CaptionPairs(source, config))
    check_fields(*(pairs.source for pairs in opened if isinstance(pairs, CaptionPairs)))
    return opened


def _has_queries(path: str) -> bool:
    """Whether the first row of a JSON Lines file is a text pair; what is wrong with a file,
    JsonlSource says."""
    with open(path, encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    return re.search(r'"query"\s*:', first) is not None


@dataclass(frozen=True)
class Survey:
    """What a source's first samples have."""

    path: str
    samples: int
    usable: dict[str, int]  # kind of pair -> samples that have one
    broken: tuple[BrokenSample, ...]  # of these samples
    pairs: tuple[Pair, ...]  # of these samples


def survey(source: PairSource) -> Survey:
    """Read the first samples of a source. Raises ValueError if none of them has a pair of some
    kind."""
    samples = min(len(source), SURVEYED)
    usable: dict[str, int] = {}
    broken: dict[int, BrokenSample] = {}
    pairs: list[Pair] = []
    for kind in source.kinds:
        of_kind: list[Pair] = []
        for number in range(samples):
            pair = source.pair(number, kind, sample_rng(0, 0, 0, number))
            if pair is not None:
                of_kind.append(pair)
            elif problem := source.problem(number):
                broken[number] = problem
        if not of_kind:
            # every row of a text-pair file has a pair
            assert isinstance(source, CaptionPairs)
            kinds_seen: set[str] = set()
            for number in range(samples):
                _, captions = source.source.captions(number)
                kinds_seen.update(caption.kind for caption in captions)
            known_kinds = ", ".join(sorted(kinds_seen)) or "none"
            unread = f"; {count_broken([*broken.values()])}" if broken else ""
            raise ValueError(
                f"{source.path}: none of the first {samples} samples "
                f"has two different captions {kind}; "
                f"known kinds: {known_kinds}{unread}. Set --fields and --pair-kinds"
            )
        usable[str(kind)] = len(of_kind)
        pairs += of_kind
    return Survey(source.path, samples, usable, tuple(broken.values()), tuple(pairs))
