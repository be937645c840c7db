"""What every source offers: random access to samples, and captions without touching an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_plugin.data.sources.captions import DEFAULT_FIELDS, count_empty, parse_fields, read_captions
from llm2clip_plugin.data.sources.records import BrokenSample, Caption, Sample
from llm2clip_plugin.data.sources.remote import Downloads, default_download_folder

FORMATS = ("auto", "webdataset", "jsonl", "llava")


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How captioned images are read."""

    format: str = "auto"  # auto | webdataset | jsonl | llava
    images: str = ""  # folder or URL that the images of a .jsonl or LLaVA's .json lie in; "" is the file's own folder
    fields: tuple[str, ...] = DEFAULT_FIELDS  # which fields are captions: NAME=KIND or NAME=KIND:LANGUAGE
    language: str = "en"  # of captions that don't say theirs
    image_field: str = "image"  # field of a .jsonl that names the image
    key_field: str = "id"  # field of a .jsonl that is the sample's key; the image's name where it is missing
    kinds: tuple[str, ...] = ()  # train with these kinds of captions alone; empty: all
    languages: tuple[str, ...] = ()  # train with captions of these languages alone; empty: all
    shuffle_window: int = 0  # shards shuffled together, for slow disks and shard caches; 0: the whole source
    cache_folder: str = ""  # downloaded shards and spare indexes; "" is LLM2CLIP_CACHE or ~/.cache/llm2clip/shards
    cache_gb: float = 0.0  # downloaded shards kept at most, 10^9 bytes; 0: all

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"unknown data format {self.format!r}; known: {', '.join(FORMATS)}")
        if self.shuffle_window < 0 or self.cache_gb < 0:
            raise ValueError(f"shuffle_window {self.shuffle_window} and cache_gb {self.cache_gb} can't be negative")
        parse_fields(self.fields, self.language)


@dataclass(frozen=True, kw_only=True)
class SourceConfig(ReadConfig):
    """Where captioned images lie and how to read them."""

    path: str  # folder of tars, a .tar, train-*.tar, {00000..00099}.tar, a .jsonl, LLaVA's .json, or a URL of these
    weight: float = 1.0  # how often a sample comes up, against a sample of a source of weight 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError("a data source needs a path")
        if self.path.startswith("file://"):
            raise ValueError(f"give the path of a local source without file://, got {self.path}")
        if not self.weight > 0:
            raise ValueError(f"weight of {self.path} is {self.weight}; expected a number above 0")

    @property
    def downloads(self) -> Downloads:
        """The local folder for what lies at a URL."""
        folder = Path(self.cache_folder) if self.cache_folder else default_download_folder()
        return Downloads(folder, limit_bytes=int(self.cache_gb * 1e9))

    def usable(self, captions: tuple[Caption, ...]) -> tuple[Caption, ...]:
        """The captions that ``kinds`` and ``languages`` let into training."""
        return tuple(
            caption
            for caption in captions
            if (not self.kinds or caption.kind in self.kinds)
            and (not self.languages or caption.language in self.languages)
        )


@dataclass(frozen=True)
class Shard:
    """A run of consecutive samples that lie, and are embedded, together."""

    name: str  # path below the source without .tar; what an embedding cache calls it
    size: int  # samples
    start: int  # number of its first sample in the source


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies, without its image."""

    key: str
    values: dict[str, Any]  # what captions are read from, by the names that SourceConfig.fields knows
    meta: dict[str, Any]  # its JSON


class Source(ABC):
    """Samples 0 .. len-1 in shards. Pickled as its configuration: a worker opens its own handles."""

    def __init__(self, config: SourceConfig, shards: tuple[Shard, ...]) -> None:
        self.config = config
        self.path = config.path
        self.name = config.path.rstrip("/").rpartition("/")[2] or config.path
        self.shards = shards
        self.fields = parse_fields(config.fields, config.language)
        self._starts = [shard.start for shard in shards]

    def __len__(self) -> int:
        return self.shards[-1].start + self.shards[-1].size if self.shards else 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, {len(self)} samples in {len(self.shards)} shards)"

    def place(self, number: int) -> tuple[int, int]:
        """Number of the shard, and of the sample within it; IndexError outside 0 .. len-1."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {self.path}, which has {len(self)}")
        shard = bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def locate(self, number: int) -> tuple[str, int]:
        """Name of the shard, and number of the sample within it."""
        shard, within = self.place(number)
        return self.shards[shard].name, within

    def captions(self, number: int) -> tuple[str, tuple[Caption, ...]]:
        """Key and captions, the image unread; no captions if they can't be read: training then names the sample."""
        try:
            raw = self.raw(number)
            return raw.key, self._captions(number, raw)
        except BrokenSample as error:
            return error.key, ()

    def __getitem__(self, number: int) -> Sample:
        """The whole sample. Raises BrokenSample if a part of it is missing or can't be read."""
        raw = self.raw(number)
        return Sample(raw.key, self.image(number), self._captions(number, raw), raw.meta)

    def empty_captions(self, number: int) -> int:
        """Captions of the sample that are there but hold no text. Raises BrokenSample if they can't be read."""
        raw = self.raw(number)
        self._captions(number, raw)
        return count_empty(raw.values, self.fields)

    def _captions(self, number: int, raw: RawSample) -> tuple[Caption, ...]:
        try:
            return read_captions(raw.values, self.fields)
        except (ValueError, RecursionError) as error:
            raise BrokenSample(self.locate(number)[0], raw.key, str(error)) from error

    @abstractmethod
    def raw(self, number: int) -> RawSample:
        """Everything but the image. Raises BrokenSample."""

    @abstractmethod
    def image(self, number: int) -> bytes:
        """The image file's bytes. Raises BrokenSample if it is missing."""
