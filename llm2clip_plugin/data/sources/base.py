"""What a source offers: samples by number. Each format of captioned images is one file of this folder."""

from __future__ import annotations

import logging
import random
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from llm2clip_plugin.contracts import canonical_json, sha256_text
from llm2clip_plugin.data.remote import Downloads, SideFolder, default_download_folder
from llm2clip_plugin.data.samples import DEFAULT_FIELDS, BrokenSample, Caption, Sample, parse_fields, read_captions
from llm2clip_plugin.files import discover
from llm2clip_plugin.options import unknown

if TYPE_CHECKING:
    from llm2clip_plugin.data.index import Stamp


READING = 1  # version of how captions are read from a sample; another one makes kept digests void


@dataclass(frozen=True, kw_only=True)
class SourceFormat:
    """A format of captioned images. A file of this folder that defines ``SOURCE`` adds one."""

    name: str  # for --format
    help: str  # the paths that it reads, as in "a .jsonl file"
    recognizes: Callable[[str], bool]  # whether a path or URL is of this format, by its name
    open: Callable[[SourceConfig, dict[str, str] | None], Source]  # the arguments of sources.open.open_source
    fallback: bool = False  # used only for paths that no other format recognizes


def formats() -> dict[str, SourceFormat]:
    """Every format by name."""
    return discover("llm2clip_plugin.data.sources", "SOURCE")


def format_help() -> str:
    """The formats and the paths that they read, for --help and errors."""
    return "; ".join(f"{known.name}: {known.help}" for known in formats().values())


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How captioned images are read."""

    format: str = "auto"  # of the data: webdataset, jsonl, llava or another of data/sources; auto: by the path's name
    images: str = ""  # folder or URL of the images that a .jsonl or .json file names; "": the file's own folder
    fields: tuple[str, ...] = DEFAULT_FIELDS  # which fields are captions: NAME=KIND or NAME=KIND:LANGUAGE
    language: str = "en"  # of captions without a language
    image_field: str = "image"  # field of a .jsonl with the image's path
    key_field: str = "id"  # field of a .jsonl with the sample's key; without it, the image's path is the key
    kinds: tuple[str, ...] = ()  # use only these kinds of captions; empty: all
    languages: tuple[str, ...] = ()  # use only captions in these languages; empty: all
    # shards shuffled together, so that few are in use at a time; 0: the entire source; -1: 16 if the data is at a URL
    # or on a network file system, else 0
    shuffle_window: int = -1
    cache_folder: str = ""  # for downloaded shards and indexes; "" is LLM2CLIP_CACHE or ~/.cache/llm2clip/shards
    cache_gb: float = 0.0  # limit for downloaded shards, 10^9 bytes; 0: no limit

    def __post_init__(self) -> None:
        if self.format != "auto" and self.format not in (known := ("auto", *formats())):
            raise ValueError(unknown("data format", self.format, known))
        if self.shuffle_window < -1 or self.cache_gb < 0:
            raise ValueError(
                f"shuffle_window is {self.shuffle_window} and cache_gb {self.cache_gb}, expected at least -1 and 0"
            )
        parse_fields(self.fields, self.language)


@dataclass(frozen=True, kw_only=True)
class SourceConfig(ReadConfig):
    """Where captioned images are and how they are read."""

    path: str  # folder of tars, a .tar, train-*.tar, {00000..00099}.tar, a .jsonl, LLaVA's .json, or a URL of these
    weight: float = 1.0  # how often a sample is drawn, relative to a sample of a source of weight 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError("no data path is set; give DATA")
        if self.path.startswith("file://"):
            raise ValueError(f"{self.path}: remove file:// from the path of a local source")
        if not self.weight > 0:
            raise ValueError(f"weight of {self.path} is {self.weight}, expected a number above 0")

    @property
    def downloads(self) -> Downloads:
        """Local copies of files at URLs."""
        folder = Path(self.cache_folder) if self.cache_folder else default_download_folder()
        return Downloads(folder, limit_bytes=int(self.cache_gb * 1e9))


@dataclass(frozen=True)
class Shard:
    """Consecutive samples that are stored, and embedded, together."""

    name: str  # path relative to the source, without .tar; embedding caches use it too
    size: int  # samples
    start: int  # number of its first sample in the source


class Source(ABC):
    """Samples 0 .. len-1, in shards. Loader workers get a pickled copy, which must open its own files."""

    side_folder: SideFolder | None = None  # of digests of the captions; None: they are computed at every start
    images_at_hand = True  # False: reading an image means a request to a server
    stamps: Sequence[Stamp] = ()  # of each shard's file, if ``side_folder`` is set

    def __init__(self, config: SourceConfig, shards: tuple[Shard, ...]) -> None:
        self.config = config
        self.path = config.path
        self.name = config.path.rstrip("/").rpartition("/")[2] or config.path
        self.shards = shards
        self.fields = parse_fields(config.fields, config.language)
        self._starts = [shard.start for shard in shards]

    @abstractmethod
    def record(self, number: int, *, image: bool = False) -> Sample:
        """A sample, its captions not yet read from ``values``; ``image``: the caller will read the image, too.

        Raises BrokenSample if it can't be read, IndexError outside 0 .. len-1.
        """

    def fetch(self, shard: int) -> None:  # noqa: B027 - a local disk needs nothing
        """Prefetch a shard: copy one from its URL, read one of a network file system into the page cache."""

    def bytes_to_fetch(self, shards: Iterable[int]) -> int:
        """Bytes that ``fetch`` copies or reads for these shards at most; 0 for a local disk."""
        return 0

    def key(self, number: int) -> str:
        """The key of a sample, also of one that can't be read."""
        try:
            return self.record(number).key
        except BrokenSample as error:
            return error.key

    def __len__(self) -> int:
        return self.shards[-1].start + self.shards[-1].size if self.shards else 0

    @property
    def digests(self) -> str:
        """Name of the file of digests of keys and captions by shard, for this choice of fields."""
        names = [field.name for field in self.fields]
        reading = [READING, type(self).__name__, names, self.config.key_field, self.config.image_field]
        return f"captions-{sha256_text(canonical_json(reading))[:16]}.json"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, {len(self)} samples in {len(self.shards)} shards)"

    def __getitem__(self, number: int) -> Sample:
        """A sample with its captions. Raises BrokenSample if its JSON or its captions can't be read."""
        return self._with_captions(number, self.record(number))

    def with_image(self, number: int) -> Sample:
        """As ``source[number]``, for a caller that will read the image: both may come from the disk in one read."""
        return self._with_captions(number, self.record(number, image=True))

    def _with_captions(self, number: int, record: Sample) -> Sample:
        try:
            captions, blank = read_captions(record.values, self.fields)
        except (ValueError, RecursionError) as error:
            raise BrokenSample(self.locate(number)[0], record.key, str(error)) from error
        return replace(record, captions=captions, blank_captions=blank)

    def captions(self, number: int) -> tuple[str, tuple[Caption, ...]]:
        """Key and captions; none of a sample that can't be read: training reports and replaces it."""
        try:
            sample = self[number]
        except BrokenSample as error:
            return error.key, ()
        return sample.key, sample.captions

    def place(self, number: int) -> tuple[int, int]:
        """Number of the shard, and of the sample within it. Raises IndexError outside 0 .. len-1."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {self.path}, which has {len(self)} samples")
        shard = bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def locate(self, number: int) -> tuple[str, int]:
        """Name of the shard, and number of the sample within it."""
        shard, within = self.place(number)
        return self.shards[shard].name, within


def shards_of(names: Sequence[str], sizes: Sequence[int]) -> tuple[Shard, ...]:
    """Shards one after another."""
    starts = accumulate(sizes, initial=0)
    return tuple(Shard(*shard) for shard in zip(names, sizes, starts, strict=False))


# Which caption of a sample is drawn: evenly over its captions, or by weights of their kinds.

log = logging.getLogger(__name__)

LOOKED_AT = 64  # samples of a source in which kinds are searched


def parse_weights(specifications: Sequence[str]) -> dict[str, float]:
    """``KIND=WEIGHT`` as in ``short=1``. Raises ValueError for another form, a duplicate, or a weight not above 0."""
    weights: dict[str, float] = {}
    for text in specifications:
        kind, equals, number = text.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not (kind and equals and 0 < weight < float("inf")):
            raise ValueError(f"caption weight {text!r} is not KIND=WEIGHT with a number above 0, as in short=1 long=1")
        if kind in weights:
            raise ValueError(f"caption weights {' '.join(specifications)} name {kind!r} twice")
        weights[kind] = weight
    return weights


def caption_shares(captions: Sequence[Caption], weights: Mapping[str, float]) -> list[float]:
    """(m) probabilities: a kind's is its weight among the kinds that the sample has, shared by its captions.

    Without ``weights`` all are equal. Raises KeyError for a caption of a kind without a weight.
    """
    if not weights:
        return [1 / len(captions)] * len(captions)
    counts = Counter(caption.kind for caption in captions)
    total = sum(weights[kind] for kind in counts)
    return [weights[caption.kind] / counts[caption.kind] / total for caption in captions]


def choose_caption(captions: Sequence[Caption], weights: Mapping[str, float], rng: random.Random) -> Caption:
    """One caption, drawn with one number of ``rng``."""
    if not weights:
        return captions[rng.randrange(len(captions))]
    draw = rng.random()
    for caption, share in zip(captions, caption_shares(captions, weights), strict=True):
        draw -= share
        if draw < 0:
            return caption
    return captions[-1]  # the shares add up to 1 but for rounding


def choose_captions(
    captions: Sequence[Caption], weights: Mapping[str, float], count: int, rng: random.Random
) -> tuple[Caption, ...]:
    """``count`` captions, drawn without replacement until none is left, then again from all."""
    chosen: list[Caption] = []
    left: list[Caption] = []
    while len(chosen) < count:
        left = left or list(captions)
        chosen.append(choose_caption(left, weights, rng))
        left.remove(chosen[-1])
    return tuple(chosen)


def check_kinds(sources: Sequence[Source], weights: Mapping[str, float]) -> None:
    """Raise ValueError if ``weights`` names a kind that no source declares and none of its first captions has.

    A kind that a source's fields declare may be rare; if no checked sample has one, it is logged as a warning.
    """
    if not weights:
        return
    declared = {field.kind for source in sources for field in source.fields}
    present = {kind for source in sources for kind in _kinds_of(source)}
    if unknown := sorted(set(weights) - declared - present):
        known = ", ".join(sorted(declared | present))
        raise ValueError(
            f"caption weights name the kinds {', '.join(unknown)}, which the data does not have; known: {known}"
        )
    if absent := sorted(set(weights) - present):
        log.warning(
            "caption weights name the kinds %s, which no checked sample has; present: %s",
            ", ".join(absent),
            ", ".join(sorted(present)) or "none",
        )


def _kinds_of(source: Source) -> set[str]:
    """The kinds of captions of up to LOOKED_AT evenly spaced samples."""
    kinds: set[str] = set()
    for number in range(0, len(source), max(1, len(source) // LOOKED_AT)):
        try:
            kinds |= {caption.kind for caption in source[number].captions}
        except BrokenSample:
            continue
    return kinds
