"""What a source offers: samples by number; how one is opened; its paths. Each format is one file of
this folder."""

from __future__ import annotations

import glob
import hashlib
import os
import tarfile
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import Any

from llm2clip_plugin.data.remote import (
    Downloads,
    Result,
    SideFolder,
    Stamp,
    default_download_folder,
    expand_braces,
    is_url,
    public_name,
    stamps_of,
)
from llm2clip_plugin.data.samples import (
    DEFAULT_FIELDS,
    BrokenSample,
    Caption,
    Sample,
    parse_fields,
    read_captions,
)
from llm2clip_plugin.discovery import discover
from llm2clip_plugin.hashes import canonical_json, sha256_text
from llm2clip_plugin.json_files import parse_json
from llm2clip_plugin.options import command, setting, unknown

PROBES = 4096  # samples of a source, evenly spaced, in which a caption field must occur
PICTURE_PROBES = 256  # evenly spaced pictures of a source that are compared by content
KIND_PROBES = 64  # samples in which kinds of captions are looked for
READING = 2  # version of how captions are read from a sample; another one makes kept digests void


@dataclass(frozen=True, kw_only=True)
class SourceFormat:
    """A format of captioned images. A file of this folder that defines ``SOURCE`` adds one."""

    name: str  # for --format
    help: str  # the paths that it reads, as in "a .jsonl file"
    # whether a path or URL is of this format, by its name
    recognizes: Callable[[str], bool]
    # the arguments of open_source
    open: Callable[[SourceConfig, dict[str, str] | None], Source]
    fallback: bool = False  # used only for paths that no other format recognizes


def formats() -> dict[str, SourceFormat]:
    """Every format by name."""
    return discover(__name__, "SOURCE")


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How captioned images are read."""

    format: str = setting(
        "auto",
        help="format of the data: webdataset, jsonl, llava, or a source of your own; auto: by the "
        "path's name",
        learned=True,
    )
    images: str = setting(
        "",
        help='folder or URL of the images that a .jsonl or .json file names; "": the file\'s own '
        "folder",
        option="image-folder",
        learned=True,
        per_host=True,
    )
    fields: tuple[str, ...] = setting(
        DEFAULT_FIELDS,
        help="which fields are captions: NAME=KIND or NAME=KIND:LANGUAGE",
        learned=True,
    )
    language: str = setting(
        "en", help="language of captions that name none", learned=True
    )
    image_field: str = setting(
        "image",
        help="field of a .jsonl with the image's path",
        learned=True,
    )
    key_field: str = setting(
        "id",
        help="field of a .jsonl with the sample's key; without it, the image's path is the key",
        learned=True,
    )
    kinds: tuple[str, ...] = setting(
        (),
        help="use only these kinds of captions; empty: all",
        learned=True,
    )
    languages: tuple[str, ...] = setting(
        (),
        help="use only captions in these languages; empty: all",
        learned=True,
    )
    shuffle_window: int = setting(
        -1,
        help="shards shuffled together, so that few are in use at a time; 0: the entire source; "
        "-1: 16 or more if the data is at a URL or on a network file system, else 0",
        learned=True,
    )
    cache_folder: str = setting(
        "",
        help='for downloaded shards and indexes; "" is LLM2CLIP_CACHE or ~/.cache/llm2clip/shards',
        learned=False,
        per_host=True,
    )
    cache_gb: float = setting(
        0.0,
        help="limit for downloaded shards, 10^9 bytes; 0: no limit",
        unit="GB",
        learned=False,
        per_host=True,
    )
    index_folder: str = setting(
        "",
        help="for indexes of tars at a URL: one that all nodes share lets one of them make it for "
        'all; "" is --cache-folder',
        learned=False,
        per_host=True,
    )

    def __post_init__(self) -> None:
        if self.format != "auto" and self.format not in formats():
            raise ValueError(unknown("data format", self.format, ("auto", *formats())))
        if self.shuffle_window < -1 or self.cache_gb < 0:
            raise ValueError(
                f"shuffle_window is {self.shuffle_window} and cache_gb {self.cache_gb}, "
                "expected at least -1 and 0"
            )
        parse_fields(self.fields, self.language)


@dataclass(frozen=True, kw_only=True)
class SourceConfig(ReadConfig):
    """Where captioned images are and how they are read."""

    path: str = setting(
        help="folder of tars, a .tar, train-*.tar, {00000..00099}.tar, a .jsonl, LLaVA's .json, or "
        "a URL of these",
        option="data",
    )
    weight: float = setting(
        1.0,
        help="how often a sample is drawn, relative to a sample of a source of weight 1",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError("no data path is set; give DATA")
        if self.path.startswith("file://"):
            raise ValueError(
                f"{self.path}: remove file:// from the path of a local source"
            )
        if not self.weight > 0:
            raise ValueError(
                f"weight of {self.path} is {self.weight}, expected a number above 0"
            )

    @property
    def downloads(self) -> Downloads:
        """Local copies of files at URLs."""
        folder = (
            Path(self.cache_folder) if self.cache_folder else default_download_folder()
        )
        return Downloads(folder, limit_bytes=int(self.cache_gb * 1e9))


@dataclass(frozen=True)
class Shard:
    """Consecutive samples that are stored, and embedded, together."""

    name: str  # path relative to the source, without .tar; embedding caches use it too
    size: int  # samples
    start: int  # number of its first sample in the source


class Source(ABC):
    """Samples 0 .. len-1, in shards. Loader workers get a pickled copy, which must open its own
    files."""

    # of digests of the captions; None: they are computed at every start
    side_folder: SideFolder | None = None
    stamps: Sequence[Stamp] = ()  # of each shard's file, if ``side_folder`` is set
    downloads_shards = False  # whether ``use_shard`` downloads

    @property
    def downloads_pictures(self) -> bool:
        """Whether pictures are at a URL."""
        return is_url(self.path)

    def __init__(self, config: SourceConfig, shards: tuple[Shard, ...]) -> None:
        self.config = config
        self.path = config.path
        self.name = public_name(config.path) or config.path
        self.shards = shards
        self.fields = parse_fields(config.fields, config.language)
        self._starts = [shard.start for shard in shards]

    @abstractmethod
    def record(self, number: int) -> Sample:
        """A sample, its captions not yet read. BrokenSample if it can't be read, IndexError outside
        0 .. len-1."""

    def key(self, number: int) -> str:
        """The key of a sample, also of one that can't be read."""
        try:
            return self.record(number).key
        except BrokenSample as error:
            return error.key

    def use_shard(self, shard: int, action: Callable[[Path], Result]) -> Result:
        """``action`` on the local file of a shard, downloaded if it is at a URL; of sources whose
        shards are files."""
        raise NotImplementedError

    def files(self) -> dict[str, str]:
        """Name -> path or URL of every file that the samples are read from, pictures too. The name
        stays when the folder of the data is moved."""
        if not os.path.isdir(self.path):
            return {self.name: self.path}
        folder = Path(self.path)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        named: dict[str, str] = {}
        for path in files:
            name = path.relative_to(folder)
            if not any(part.startswith(".") for part in name.parts):
                named[str(name)] = str(path)
        return named

    def file_stamps(self) -> list[list[Any]]:
        """Name, size and time of every file that the samples are read from, pictures too; the name
        alone of one that is missing or at a URL."""
        files = self.files()
        stamps = stamps_of([os.path.normpath(path) for path in files.values()])
        table: list[list[Any]] = []
        for name, stamp in zip(files, stamps, strict=True):
            table.append([name, *(stamp or ())])
        return table

    def picture_digests(self) -> dict[str, str]:
        """Digests that show a run that pictures were replaced, without reading all of them. They
        are the same wherever the data is; one that would have to be downloaded is ""."""
        return {"content": "" if self.downloads_pictures else self._probe_pictures()}

    def _probe_pictures(self) -> str:
        """A digest of PICTURE_PROBES evenly spaced pictures."""
        digest = hashlib.sha256()
        for number in range(0, len(self), len(self) // PICTURE_PROBES + 1):
            try:
                picture = self.record(number).read_image()
            except BrokenSample:
                picture = b""
            digest.update(hashlib.sha256(picture).digest())
        return digest.hexdigest()[:12]

    def __len__(self) -> int:
        if not self.shards:
            return 0
        last = self.shards[-1]
        return last.start + last.size

    def __getitem__(self, number: int) -> Sample:
        """A sample with its captions. Raises BrokenSample if its JSON or its captions can't be
        read."""
        record = self.record(number)
        try:
            captions, blank = read_captions(record.values, self.fields)
        except (ValueError, RecursionError) as error:
            raise BrokenSample(
                self.locate(number)[0], record.key, str(error)
            ) from error
        return replace(record, captions=captions, blank_captions=blank)

    def captions(self, number: int) -> tuple[str, tuple[Caption, ...]]:
        """Key and captions; no captions if the sample can't be read, which training reports."""
        try:
            sample = self[number]
        except BrokenSample as error:
            return error.key, ()
        return sample.key, sample.captions

    # Digests of each shard's keys and captions for this choice of fields, so that a later start
    # need not read them.

    def known_digests(self) -> dict[str, list[str]]:
        """Of each shard whose file is the one that was read: its digest, and those of caches that
        hold its captions."""
        recorded = (
            self.side_folder.read_json(self._digests()) if self.side_folder else {}
        )
        digests_by_shard: dict[str, list[str]] = {}
        for shard, stamp in zip(self.shards, self.stamps, strict=bool(recorded)):
            match recorded.get(shard.name):
                case {"stamp": was, "fits": [_, *_] as fits} if was == list(stamp):
                    digests_by_shard[shard.name] = list(map(str, fits))
        return digests_by_shard

    def record_digests(self, results: Mapping[str, tuple[str, str]]) -> None:
        """Add (digest, digest of a cache that has these captions) of some shards; the caller holds
        the ``lock``."""
        if self.side_folder is None or not results:
            return
        recorded_digests = self.known_digests()
        names = [shard.name for shard in self.shards]
        stamps = dict(zip(names, self.stamps, strict=True))
        entries = {}
        for name, (digest, in_cache) in results.items():
            recorded = recorded_digests.get(name, [digest])
            others = {in_cache}
            if recorded[0] == digest:
                others.update(recorded)
            fits = [digest, *sorted(others - {digest})]
            entries[name] = {"stamp": list(stamps[name]), "fits": fits}
        self.side_folder.add_json(self._digests(), entries)

    def lock(self, doing: str) -> AbstractContextManager[Path | None]:
        """Held by one process while the others that start together wait."""
        return self.side_folder.lock(doing) if self.side_folder else nullcontext()

    def _digests(self) -> str:
        names = [field.name for field in self.fields]
        reading = [
            READING,
            type(self).__name__,
            names,
            self.config.key_field,
            self.config.image_field,
        ]
        return f"captions-{sha256_text(canonical_json(reading))[:16]}.json"

    def place(self, number: int) -> tuple[int, int]:
        """Number of the shard, and of the sample within it; IndexError outside 0 .. len-1."""
        if not 0 <= number < len(self):
            raise IndexError(
                f"sample {number} of {self.path}, which has {len(self)} samples"
            )
        shard = bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def locate(self, number: int) -> tuple[str, int]:
        """Name of the shard, and number of the sample within it."""
        shard, within = self.place(number)
        return self.shards[shard].name, within


def parse_object(data: bytes, shard: str, key: str, what: str = "") -> dict[str, Any]:
    """The JSON object of a sample. Raises BrokenSample for anything else."""
    try:
        value = parse_json(data)
    except ValueError as error:
        raise BrokenSample(shard, key, f"{what}is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BrokenSample(
            shard, key, f"{what}contains a {type(value).__name__}, expected an object"
        )
    return value


def shards_of(names: Sequence[str], sizes: Sequence[int]) -> tuple[Shard, ...]:
    """Shards one after another."""
    starts = accumulate(sizes, initial=0)
    return tuple(Shard(*shard) for shard in zip(names, sizes, starts, strict=False))


def open_source(
    config: SourceConfig, broken_shards: dict[str, str] | None = None
) -> Source:
    """The source of ``config``, indexed. A broken shard is noted in ``broken_shards`` (name ->
    reason), or a ValueError. Raises FileNotFoundError if there is no data, ValueError if the format
    cannot be determined."""
    if config.format != "auto":
        return formats()[config.format].open(config, broken_shards)
    for source_format in sorted(formats().values(), key=attrgetter("fallback")):
        if source_format.recognizes(config.path):
            return source_format.open(config, broken_shards)
    if not os.path.exists(config.path):
        raise FileNotFoundError(f"no data at {config.path}")
    names_and_help = (
        f"{source_format.name}: {source_format.help}"
        for source_format in formats().values()
    )
    choices = "; ".join(names_and_help)
    raise ValueError(
        f"cannot determine the format of {config.path}; choose one with --format ({choices}), "
        f"or {how_to_make_tars(config.path)}"
    )


def check_fields(*sources: Source, needed: bool = False) -> None:
    """Raise ValueError for a field of ``--fields`` that no sample of the sources has; the default's
    may be missing. ``needed``: also if no sample has a caption. Stops at the sample that shows what
    is looked for, mostly the first."""
    fields = sources[0].config.fields if sources else ()
    missing: dict[str, str] = {}
    if fields != DEFAULT_FIELDS:
        missing = {field.partition("=")[0]: field for field in fields}
    broken: list[BrokenSample] = []
    available = set[str]()
    needs_caption = needed
    if not missing and not needs_caption:
        return
    for source in sources:
        for sample in _probe(source, PROBES, broken):
            available |= sample.values.keys()
            for name in list(missing):
                if sample.values.get(name):
                    del missing[name]
            if sample.captions:
                needs_caption = False
            if not missing and not needs_caption:
                return
    where = ", ".join(source.path for source in sources)
    if broken and not available:
        raise ValueError(f"{where}: no sample can be read; the first: {broken[0]}")
    if missing:
        name, field = next(iter(missing.items()))
        problem = f"no sample of {where} has a field {name!r} (--fields {field})"
    else:
        names = ", ".join(field.name for field in sources[0].fields)
        problem = f"no sample of {where} has a caption in {names}"
    raise ValueError(
        f"{problem}; known: {', '.join(sorted(available)[:20])}; choose with --fields NAME=KIND"
    )


def check_kinds(sources: Sequence[Source], weights: Mapping[str, float]) -> None:
    """Raise ValueError if ``weights`` names a kind that no source declares and none of its first
    captions has."""
    if not weights:
        return
    kinds = {field.kind for source in sources for field in source.fields}
    for source in sources:
        for sample in _probe(source, KIND_PROBES):
            kinds.update(caption.kind for caption in sample.captions)
    missing = sorted(set(weights) - kinds)
    if missing:
        raise ValueError(
            f"caption weights name the kinds {', '.join(missing)}, which the data does not have; "
            f"known: {', '.join(sorted(kinds))}"
        )


def _probe(
    source: Source, count: int, broken: list[BrokenSample] | None = None
) -> Iterator[Sample]:
    """About ``count`` evenly spaced samples; those that can't be read go to ``broken``."""
    for number in range(0, len(source), len(source) // count + 1):
        try:
            yield source[number]
        except BrokenSample as error:
            if broken is not None:
                broken.append(error)


def how_to_make_tars(path: str) -> str:
    """What to do with pictures or a table."""
    return f"make some of pictures or a table: {command('data', 'make', path, '--output', 'DIR')}"


# Paths of data, and the members of tars, of captioned and of labeled images alike.

BLOCK = tarfile.BLOCKSIZE  # 512 bytes; headers and contents start on multiples of it


def data_folder(path: str) -> Path:
    """The local folder of the data at ``path``, which shard names are relative to and caches are
    kept in. For braces and wildcards that match several folders it is their longest common one.
    Raises ValueError for a URL."""
    if is_url(path):
        raise ValueError(f"{path} is not a local folder")
    if os.path.isdir(path):
        return Path(path)
    root = "/" if path.startswith("/") else ""
    return Path(common_folder(expand(path)) or root)


def expand(pattern: str) -> list[str]:
    """Local paths that match braces and wildcards; a pattern without a match is itself the path."""
    paths: list[str] = []
    for wildcard in expand_braces(pattern):
        matches: list[str] = []
        if glob.has_magic(wildcard):
            matches = sorted(glob.glob(wildcard, recursive=True))
        paths += matches or [wildcard]
    return paths


def common_folder(files: Sequence[str]) -> str:
    """The longest folder that all ``files`` are below; "" if they share none."""
    folders = [file.rpartition("/")[0].split("/") for file in files]
    shared: list[str] = []
    for parts in zip(*folders, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "/".join(shared)


class BrokenShard(ValueError):  # noqa: N818
    """A tar that can't be read to its end: which one, and why."""


def scan_tar(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of an uncompressed tar. Raises BrokenShard for another file, a
    damaged header, a truncated member, or no end-of-archive marker (of a writer that was killed),
    which tarfile does not miss."""
    try:
        with (
            open(path, "rb") as file,
            tarfile.open(
                fileobj=file, mode="r:", encoding="utf-8", errors="replace"
            ) as tar,
        ):
            for member in tar:
                if member.size < 0:
                    raise tarfile.ReadError(
                        f"{member.name!r} has a size of {member.size}"
                    )
                if member.isreg():
                    yield member
            file.seek(tar.offset)
            end = file.read(BLOCK)
            if len(end) < BLOCK or any(end):
                raise tarfile.ReadError(
                    f"no end-of-archive marker or member at byte {tar.offset}"
                )
            # of a tar without members
            if tar.offset == 0 and file.seek(0, os.SEEK_END) > tarfile.RECORDSIZE:
                raise tarfile.ReadError("it begins with zeros")
    except (tarfile.TarError, ValueError) as error:
        raise BrokenShard(
            f"{path}: no tar, compressed, truncated or damaged: {error}; write it again"
        ) from error


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension, split as WebDataset does: at the first dot after the last
    slash."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()
