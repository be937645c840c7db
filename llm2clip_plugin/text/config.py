"""The settings of stage 1: pairs, adapter, loss; read without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from llm2clip_plugin.data.sources.base import ReadConfig
from llm2clip_plugin.options.names import unknown

PostKind = Literal["none", "centre", "whiten"]
PAIR_FORMATS = ("auto", "captions", "pairs", "text")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """LoRA adapter of the LLM."""

    r: int = 16  # rank
    alpha: int = 32  # the update is scaled by alpha / r, or by alpha / sqrt(r) with rslora
    dropout: float = 0.05  # dropout on the adapter's input
    # names of the linear layers to adapt; all-linear: every linear layer of the blocks
    targets: tuple[str, ...] = (ALL_LINEAR,)
    dora: bool = False  # weight-decomposed LoRA (Liu et al. 2024)
    rslora: bool = False  # rank-stabilized scale (Kalajdzievski 2023)

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"r {self.r} and alpha {self.alpha} must be at least 1, dropout {self.dropout} in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """The loss of caption-contrastive training."""

    scale: float = 50.0  # logit scale (1 / temperature), as in the paper; the initial value if it is learned
    learn_scale: bool = False  # learn the logit scale, up to 100
    # groups of similar length in which a micro-batch's texts are padded: less padding, same result
    length_groups: int = 4
    mask_same: bool = True  # pairs with a common text or image are not negatives of each other
    symmetric: bool = True  # half of the loss retrieves queries from positives; without, all retrieves positives

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 100:
            raise ValueError(f"scale is {self.scale}; expected a number above 0, at most 100")
        if self.length_groups < 1:
            raise ValueError(f"length_groups is {self.length_groups}; expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Training data, and which two texts form a pair."""

    data: tuple[str, ...] = ()  # caption sets (as for the tower), .jsonl of text pairs, .txt with one text per line
    weights: tuple[float, ...] = ()  # how often a sample of each is drawn; empty: all equal
    pair_format: str = "auto"  # auto | captions | pairs | text (each text with itself: unsupervised SimCSE by dropout)
    # of caption sets: QUERY:POSITIVE[=WEIGHT], KIND:same for two of a kind
    pair_kinds: tuple[str, ...] = ("short:long",)
    mix_kinds: bool = False  # draw a kind for each pair; without, all pairs of a batch are of one kind
    # of caption sets: text before the queries of a kind of caption, KIND=TEXT, not pooled; others have query_prompt
    instructions: tuple[str, ...] = ()
    # of caption sets: a hard negative for each pair, the caption of the positive's kind of a random other image
    random_negatives: bool = False
    lists: tuple[str, ...] = ()  # KIND=LOW:HIGH: captions of this kind are comma-separated; draw LOW to HIGH items
    group: str = ""  # field of a sample's JSON: samples with equal values are not used as negatives of each other
    query_field: str = "query"  # of text-pair files
    positive_field: str = "positive"  # of text-pair files; a text, or a list whose first text is used
    negative_field: str = "negative"  # of text-pair files: a hard negative, in all rows or in none
    instruction_field: str = "instruction"  # of text-pair files: text before the query, not pooled; else query_prompt
    cut_queries: bool = False  # truncate queries above max_tokens; otherwise they are an error before training
    # how caption sets are read; stage 1 has an order of its own, without windows
    read: ReadConfig = field(default_factory=lambda: ReadConfig(shuffle_window=0))

    def __post_init__(self) -> None:
        if self.pair_format not in PAIR_FORMATS:
            raise ValueError(unknown("pair_format", self.pair_format, PAIR_FORMATS))
        if self.weights and len(self.weights) != len(self.data):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.data)} data sets; pass one weight per data set, or none"
            )
        if any(not weight > 0 for weight in self.weights):
            raise ValueError(f"weights are {self.weights}, expected numbers above 0")
        parse_kinds(self.pair_kinds)
        parse_lists(self.lists)
        parse_instructions(self.instructions)


@dataclass(frozen=True)
class PairKind:
    """Kinds of the query and the positive caption, and how often they are drawn."""

    query: str
    positive: str
    weight: float = 1.0

    @property
    def of_positive(self) -> str:
        """The kind of the positive caption."""
        return self.query if self.positive == "same" else self.positive

    def __str__(self) -> str:
        return f"{self.query}:{self.positive}"


def parse_kinds(specifications: Sequence[str]) -> tuple[PairKind, ...]:
    """Read ``short:long`` or ``short:keywords=0.8``; raises ValueError for another form."""
    kinds_of_pairs = []
    for text in specifications:
        kinds, _, weight = text.partition("=")
        query, colon, positive = kinds.partition(":")
        try:
            number = float(weight) if weight else 1.0
        except ValueError:
            number = -1.0
        if not (query and colon and positive and number > 0):
            raise ValueError(f"invalid pair kind {text!r}; expected QUERY:POSITIVE[=WEIGHT], such as short:long=0.5")
        kinds_of_pairs.append(PairKind(query, positive, number))
    if not kinds_of_pairs:
        raise ValueError("no pair kinds configured; set at least one with --pair-kinds, such as short:long")
    return tuple(kinds_of_pairs)


def parse_lists(specifications: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Read ``keywords=2:6``: kind -> least and most items drawn; raises ValueError for another form."""
    bounds_of = {}
    for text in specifications:
        kind, _, bounds = text.partition("=")
        low, _, high = bounds.partition(":")
        if not (kind and low.isdigit() and high.isdigit() and 0 < int(low) <= int(high)):
            raise ValueError(f"invalid list {text!r}; expected KIND=LOW:HIGH, such as keywords=2:6")
        bounds_of[kind] = (int(low), int(high))
    return bounds_of


def parse_instructions(specifications: Sequence[str]) -> dict[str, str]:
    """Read ``short=Find the long caption: ``: kind of the query -> text; raises ValueError for another form."""
    parsed = {kind: text for kind, equals, text in (item.partition("=") for item in specifications) if kind and equals}
    if len(parsed) != len(specifications):
        raise ValueError(f"instructions {list(specifications)} must be KIND=TEXT, one for each kind of query")
    return parsed
