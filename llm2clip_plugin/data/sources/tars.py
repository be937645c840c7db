"""WebDataset tars as img2dataset writes them: KEY.jpg with KEY.txt and/or KEY.json, read in any order."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from llm2clip_plugin.console import track
from llm2clip_plugin.data.index import (
    ABSENT,
    BLOCK,
    IMAGE_EXTENSIONS,
    TAR_INDEX_COLUMNS,
    BrokenShard,
    DamagedIndex,
    Entry,
    IndexFile,
    Part,
    ShardRows,
    Table,
    TarIndex,
    find_index,
    has_index,
    index_path,
    is_header_of,
    make_entry,
    open_index,
    stamps_of,
    write_index,
)
from llm2clip_plugin.data.remote import (
    MOUNTS,
    Downloads,
    KeptFolder,
    Result,
    SteadyFile,
    expand_braces,
    file_system,
    has_suffix,
    is_network,
    is_url,
    list_urls,
)
from llm2clip_plugin.data.samples import BrokenSample, Record, Sample
from llm2clip_plugin.data.sources.base import Shard, Source, SourceConfig, SourceFormat
from llm2clip_plugin.data.workers import cores, process_pool
from llm2clip_plugin.options import command

# The tars of a path or URL: listed, downloaded if they are at a URL, and indexed.

DOWNLOADS_AT_ONCE = 4
LOOKED_AT = 10_000  # files of a folder without tars
FEW = 16  # shards that are indexed in this process, without a pool


def list_tars(path: str) -> list[tuple[str, str]]:
    """(shard name, path or URL) of each tar of ``path``, in order of name.

    A shard's name is its path relative to the longest folder that all tars share, without ``.tar``. Raises
    FileNotFoundError if there is none, ValueError for a duplicate name.
    """
    if is_url(path):
        tars = list_urls(path, ".tar")
    elif os.path.isdir(path):
        tars = sorted(str(file) for file in Path(path).rglob("*.tar") if not file.name.startswith("."))
    else:
        tars = _expand(path)
    if not tars:
        raise FileNotFoundError(f"no .tar files in {path}{instead_of_tars(path)}")
    base = base_folder(path, tars)
    names = [
        (tar[len(base) :].lstrip("/") if is_url(path) else os.path.relpath(tar, base or ".")).removesuffix(".tar")
        for tar in tars
    ]
    if len(set(names)) < len(names):
        duplicates = [name for name, count in sorted(Counter(names).items()) if count > 1]
        raise ValueError(f"{path} lists shards more than once: {', '.join(duplicates)}")
    return list(zip(names, tars, strict=True))


def base_folder(path: str, tars: Sequence[str]) -> str:
    """The folder or URL that shard names are relative to: ``path`` itself, or the longest one that all tars share."""
    return path if os.path.isdir(path) else _common_folder([tar.rpartition("/")[0] for tar in tars])


def data_folder(path: str) -> Path:
    """The local folder of the data at ``path``, which shard names are relative to and caches are kept in.

    For braces and wildcards that match several folders it is their longest common one. Raises ValueError for a URL.
    """
    if is_url(path):
        raise ValueError(f"{path} is not a local folder")
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        return Path(path).parent
    return Path(_common_folder([tar.rpartition("/")[0] for tar in _expand(path)]) or path[: path.startswith("/")])


def _expand(pattern: str) -> list[str]:
    """Local paths that match braces and wildcards; a pattern without a match is returned unchanged."""
    return [
        path
        for one in expand_braces(pattern)
        for path in (glob.has_magic(one) and sorted(glob.glob(one, recursive=True))) or [one]
    ]


def _common_folder(folders: list[str]) -> str:
    """The longest folder that all ``folders`` start with."""
    parts = [folder.split("/") for folder in folders]
    same = 0
    while all(len(part) > same for part in parts) and len({part[same] for part in parts}) == 1:
        same += 1
    return "/".join(parts[0][:same])


def use_tar(downloads: Downloads, tar: str, action: Callable[[Path], Result]) -> Result:
    """``action`` on a tar as a local file, downloaded if it is at a URL.

    Raises FileNotFoundError if there is no such shard, PermissionError if access is denied, ConnectionError if its
    download fails.
    """
    if is_url(tar):
        return downloads.use(tar, action)
    try:
        return action(Path(tar))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"no shard at {tar}") from error


def open_tar(downloads: Downloads, tar: str) -> TarIndex:
    """The index of one tar. A tar at a URL whose index is kept is not downloaded for it.

    Raises BrokenShard, and what ``use_tar`` raises.
    """
    if is_url(tar) and not downloads.local_path(tar).exists():
        index = find_index(downloads.local_path(tar), downloads.folder)
        if index is not None:
            return index
    try:
        return use_tar(downloads, tar, lambda path: open_index(path, downloads.folder))
    except BrokenShard as error:
        if not is_url(tar):
            raise
        downloads.forget(tar)
        raise BrokenShard(f"{tar}: {error}; the copy is deleted, so the next start downloads it again") from error


def prepare_tars(tars: Sequence[str], downloads: Downloads) -> None:
    """Download and index many tars in parallel, with a progress bar; ``open_tar`` then finds each index."""
    remote = any(is_url(tar) for tar in tars)
    missing = [tar for tar in tars if not has_index(_local_name(tar, downloads), downloads.folder)]
    if not missing or (len(missing) <= FEW and not remote):
        return
    pool = ThreadPoolExecutor(DOWNLOADS_AT_ONCE) if remote else process_pool(cores())
    with pool as executor:
        at_once = 1 if remote else max(1, min(32, len(missing) // (8 * cores())))
        done = executor.map(partial(_prepare, downloads), missing, chunksize=at_once)
        for _ in track(done, total=len(missing), label="download and index" if remote else "index", unit="shards"):
            pass


def _local_name(tar: str, downloads: Downloads) -> Path:
    return downloads.local_path(tar) if is_url(tar) else Path(tar)


def _prepare(downloads: Downloads, tar: str) -> None:
    try:
        open_tar(downloads, tar)
    except (BrokenShard, FileNotFoundError, PermissionError):
        pass  # open_tar raises it again, in order of the shards


def instead_of_tars(path: str) -> str:
    """What to do with the files that a folder, or a path itself, has instead of tars; "" if that is not known."""
    root = Path(path)
    files = [root] if root.is_file() else itertools.islice(root.rglob("*"), LOOKED_AT) if root.is_dir() else []
    found = {file.suffix.lower(): file for file in files if not file.name.startswith(".")}
    for ending, file in found.items():
        if re.search(r"\.(tgz|tar\.\w+)$", file.name.lower()):
            return f"; {file.name} is compressed: decompress it to a .tar, its images are compressed already"
        if ending in (".csv", ".tsv", ".parquet"):
            return f"; make a data set of the table: {command('data', 'make', file, '--output', 'DIR')}"
        if ending == ".jsonl":
            return f"; give the file itself: {file}"
    if any(ending.lstrip(".") in IMAGE_EXTENSIONS for ending in found):
        return f"; make a data set of the pictures: {command('data', 'make', path, '--output', 'DIR')}"
    return ""


# The tars of a source with the one index of all of them, which is built from the tars' own indexes.

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TarSet:
    """Tars and their index, in the same order."""

    tars: tuple[str, ...]  # paths or URLs
    kept: KeptFolder
    index: IndexFile

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _reopen, (self.tars, self.kept, self.index.path)


def _reopen(tars: tuple[str, ...], kept: KeptFolder, path: Path) -> TarSet:
    """In a loader process: nothing is listed or compared again."""
    return TarSet(tars, kept, IndexFile(path))


def open_tars(path: str, downloads: Downloads, broken: dict[str, str] | None) -> TarSet:
    """The tars of ``path``, downloaded if they are at a URL and indexed, by one process of those that open them.

    Raises FileNotFoundError without tars, BrokenShard for a broken one; with ``broken``, these are noted there
    (name -> reason) and left out.
    """
    listed = list_tars(path)
    base = base_folder(path, [tar for _, tar in listed])
    if is_url(path):
        kept, pattern = KeptFolder.of_url(base, downloads.folder), path[len(base) :]
    else:
        kept, pattern = KeptFolder.of(base or ".", downloads.folder), os.path.relpath(path, base or ".")
    name = f"shards-{hashlib.sha256(pattern.encode()).hexdigest()[:16]}.index"
    index = _open_current(kept, name, listed, downloads)
    if index is None:
        with kept.lock(f"index {path}"):
            index = _open_current(kept, name, listed, downloads)
            if index is None:
                index = _build(kept, name, listed, downloads, broken)
    tars = dict(listed)
    return TarSet(tuple(tars[shard] for shard in index.table.names), kept, index)


def _open_current(
    kept: KeptFolder, name: str, listed: Sequence[tuple[str, str]], downloads: Downloads
) -> IndexFile | None:
    """The index if it is of these tars as they are now."""
    for path in kept.paths(name):
        try:
            index = IndexFile(path)
        except FileNotFoundError:
            continue
        except (OSError, DamagedIndex) as error:
            log.warning("%s; the index is built again", error)
            continue
        if index.columns == TAR_INDEX_COLUMNS and _is_current(index.table, listed, downloads):
            return index
    return None


def _is_current(table: Table, listed: Sequence[tuple[str, str]], downloads: Downloads) -> bool:
    if table.broken or table.names != [name for name, _ in listed]:
        return False  # a broken shard may have been replaced
    tars = [tar for _, tar in listed]
    if not any(map(is_url, tars)):
        return table.stamps == stamps_of(tars)
    copies = [downloads.local_path(tar) for tar in tars]
    files = stamps_of([*map(str, copies), *(str(index_path(copy)) for copy in copies)])
    return all(
        index is not None and (copy is None or copy[0] == expected[0])  # a copy may have been evicted
        for copy, index, expected in zip(files[: len(tars)], files[len(tars) :], table.stamps, strict=True)
    )


def _build(
    kept: KeptFolder,
    name: str,
    listed: Sequence[tuple[str, str]],
    downloads: Downloads,
    broken: dict[str, str] | None,
) -> IndexFile:
    prepare_tars([tar for _, tar in listed], downloads)
    reasons: dict[str, str] = {}

    def shards() -> Iterator[ShardRows]:
        for shard, tar in track(listed, total=len(listed), label="join the indexes", unit="shards"):
            try:
                index = open_tar(downloads, tar)
            except (BrokenShard, FileNotFoundError, PermissionError) as error:
                if broken is None:
                    raise
                reasons[shard] = str(error)
            else:
                yield ShardRows(shard, index.stamp, index.table, index.keys)

    path = kept.write(name, lambda path: write_index(path, shards(), reasons, TAR_INDEX_COLUMNS))
    if broken is not None:
        broken.update(reasons)
    return IndexFile(path)


OPEN_FILES = 64  # tars held open by one process
PIECE = 4 << 20  # bytes of one read of an entire shard
GAP = 64 << 10  # bytes between two parts of a sample that are read too: a second read of a network disk costs more


class TarSource(Source):
    """Samples of tars in a folder, or of the local copies of tars at a URL.

    A broken shard raises BrokenShard, or, if ``broken_shards`` is given, is noted there (name -> reason) and left out.
    """

    def __init__(
        self, config: SourceConfig, broken_shards: dict[str, str] | None = None, opened: TarSet | None = None
    ) -> None:
        self._files: OrderedDict[int, SteadyFile] = OrderedDict()  # shard number -> its tar, last used last
        self._downloads = config.downloads
        self._set = opened or open_tars(config.path, self._downloads, broken_shards)
        table, shards, start = self._set.index.table, [], 0
        for name, samples in zip(table.names, table.samples, strict=True):
            shards.append(Shard(name, samples, start))
            start += samples
        super().__init__(config, tuple(shards))
        self.kept, self.stamps = self._set.kept, table.stamps
        if start == 0 and not table.broken:
            raise ValueError(
                f"{config.path}: none of the {len(shards)} tars has an image, .txt or .json member; a member's key "
                "ends at its first dot (WebDataset's rule), so 'a.b.jpg' is no .jpg: rename such members"
            )

    def __reduce__(self) -> tuple[type[TarSource], tuple[SourceConfig, None, TarSet]]:
        return TarSource, (self.config, None, self._set)

    def fetch(self, shard: int) -> None:
        tar = self._set.tars[shard]
        if is_url(tar):
            self._downloads.fetch(tar)
        elif self._on_network:
            with closing(SteadyFile(tar)) as file:
                for start in range(0, self.stamps[shard][0], PIECE):
                    file.read(PIECE, start)

    def bytes_to_fetch(self, shards: Iterable[int]) -> int:
        return sum(self.stamps[shard][0] for shard in shards if self._on_network)

    @cached_property
    def _on_network(self) -> bool:
        return is_network(self.path)

    def key(self, number: int) -> str:
        shard, within = self.place(number)
        columns, key = self._set.index.row(shard, within)
        return make_entry(columns[:6], key).key

    def use_shard(self, shard: int, action: Callable[[Path], Result]) -> Result:
        """``action`` on the tar of a shard as a local file, downloaded if it is at a URL."""
        return use_tar(self._downloads, self._set.tars[shard], action)

    def record(self, number: int) -> Record:
        return self._record(number, with_image=False)

    def record_with_image(self, number: int) -> Record:
        return self._record(number, with_image=True)

    def with_image(self, number: int) -> Sample:
        return self._sample(number, self.record_with_image(number))

    def _record(self, number: int, *, with_image: bool) -> Record:
        shard, within = self.place(number)
        columns, key = self._set.index.row(shard, within)
        entry, name = make_entry(columns[:6], key), self.shards[shard].name
        wanted = (entry.json, entry.text, entry.image) if with_image else (entry.json, entry.text)
        parts = self._read(shard, entry.key, [part for part in wanted if part[0] != ABSENT])
        meta: dict[str, Any] = {}
        if entry.json in parts:
            try:
                meta = json.loads(parts[entry.json])
            except (ValueError, RecursionError) as error:
                raise BrokenSample(name, entry.key, f"its .json is not valid JSON: {error}") from error
            if not isinstance(meta, dict):
                raise BrokenSample(name, entry.key, f"its .json contains a {type(meta).__name__}, expected an object")
        values = meta
        if entry.text in parts:
            values = {**meta, "txt": parts[entry.text].decode("utf-8", "replace")}
        return Record(entry.key, values, meta, partial(self._image, shard, entry, parts.get(entry.image)))

    def _image(self, shard: int, entry: Entry, data: bytes | None) -> bytes:
        """The image, which ``data`` is if it was read with the sample."""
        if entry.image[0] == ABSENT:
            raise BrokenSample(self.shards[shard].name, entry.key, "no .jpg, .png or .webp in the tar")
        return self._read(shard, entry.key, [entry.image])[entry.image] if data is None else data

    def _read(self, shard: int, key: str, parts: Sequence[Part]) -> dict[Part, bytes]:
        """Parts of a sample, neighbors in one read. BrokenSample unless their headers in the tar are the sample's."""
        contents: dict[Part, bytes] = {}
        for span in join_parts(parts):
            start = max(0, span[0][0] - BLOCK)
            stop = max(offset + size for offset, size in span)
            data = self._file(shard).read(stop - start, start)
            if len(data) != stop - start:
                raise ValueError(
                    f"{self._set.tars[shard]} was truncated while being read: "
                    f"got {len(data)} of {stop - start} bytes at byte {start}"
                )
            for offset, size in span:
                at = offset - start
                if not is_header_of(data[at - BLOCK : at], key, size):
                    raise BrokenSample(self.shards[shard].name, key, self._changed(shard, offset))
                contents[offset, size] = data[at : at + size]
        return contents

    def _file(self, shard: int) -> SteadyFile:
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = SteadyFile(self._set.tars[shard], partial(self._open, shard))
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        else:
            self._files.move_to_end(shard)
        return file

    def _open(self, shard: int) -> int:
        """A descriptor of the tar, whose size must be the indexed one."""
        tar, expected = self._set.tars[shard], self.stamps[shard][0]
        descriptor = use_tar(self._downloads, tar, lambda path: os.open(path, os.O_RDONLY))
        size = os.fstat(descriptor).st_size
        if size != expected:
            os.close(descriptor)
            copy = f"delete {self._downloads.local_path(tar)} and its index, and " if is_url(tar) else ""
            raise ValueError(f"{tar} was replaced: {size} bytes, {expected} when it was indexed; {copy}restart")
        return descriptor

    def _changed(self, shard: int, offset: int) -> str:
        tar = self._set.tars[shard]
        if is_url(tar):
            remedy = f"delete {self._downloads.local_path(tar)}, its index and {self._set.kept.main}, and restart"
        else:
            remedy = f"run `touch {tar}` and restart to index it again"
        return f"the tar has another member at byte {offset}: it was changed after it was indexed; {remedy}"


def join_parts(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts by offset, those with at most GAP bytes between them together."""
    spans: list[list[Part]] = []
    for part in sorted(parts):
        if spans and part[0] - sum(spans[-1][-1]) <= GAP:
            spans[-1].append(part)
        else:
            spans.append([part])
    return spans


def _holds_tars(path: str) -> bool:
    """Whether a path is a .tar, a wildcard or braces, or a folder or URL, which may hold anything."""
    return has_suffix(path, ".tar") or os.path.isdir(path) or is_url(path) or bool({*path} & {*"*{"})


SOURCE = SourceFormat(
    name="webdataset",
    help="a .tar, or a folder of .tar shards",
    recognizes=_holds_tars,
    open=TarSource,
    fallback=True,
)


# What a run requires of the disk, and which order of samples its disk sustains.

NETWORK_WINDOW = 16  # shards; of 10,000 samples each: 160,000, dozens of global batches
CHECKED_RATE = 1000.0  # images a second and ...
CHECKED_PROCESSES = 64  # loader processes that `data check` assumes: a node of eight GPUs


def shuffle_window(configured: int, paths: Sequence[str], mounts: str = MOUNTS) -> int:
    """Shards that are shuffled together, 0 for whole sources: as configured, or, for -1, by where the data is."""
    if configured >= 0:
        return configured
    return NETWORK_WINDOW if any(is_network(path, mounts) for path in paths) else 0


@dataclass(frozen=True, kw_only=True)
class ReadRate:
    """What all loader processes of a run together ask of the disk or the server."""

    images: float  # a second
    opens: float  # a second
    bytes: float  # a second

    def __str__(self) -> str:
        return (
            f"{self.images:,.0f} images/s: {self.opens:,.0f} opens/s, {self.images:,.0f} samples read/s, "
            f"{self.bytes / 1e6:,.0f} MB/s"
        )


def read_rate(
    *,
    images: float,
    mean_bytes: float,
    shards: int,
    samples: int,
    window: int,
    processes: int,
    loose: float = 0.0,
) -> ReadRate:
    """The rate at ``images`` a second over all ranks.

    mean_bytes: of a sample; shards, samples: of the data; window: shards shuffled together, 0: all; processes: those
    that read, over all ranks; loose: see loose_images. A process opens each shard of a window once if it can keep the
    window open.
    """
    if not shards:
        return ReadRate(images=images, opens=0.0, bytes=images * mean_bytes)
    active = min(window or shards, shards)
    if active <= OPEN_FILES:
        windows = images / max(samples * active / shards, 1)  # windows a second
        opens = 0.0 if active == shards else min(images, windows * active * processes)
    else:
        opens = images * (1 - OPEN_FILES / active)
    return ReadRate(images=images, opens=opens * (1 - loose) + images * loose, bytes=images * mean_bytes)


def loose_images(sources: Sequence[Source]) -> float:
    """Fraction of the samples whose image is a file of its own, not a member of a tar."""
    loose = sum(len(source) for source in sources if not isinstance(source, TarSource))
    return loose / max(1, sum(map(len, sources)))


def reading_report(source: Source, mean_bytes: float) -> dict[str, Any]:
    """What training at CHECKED_RATE images a second on CHECKED_PROCESSES processes asks of a source's disk."""
    window = shuffle_window(source.config.shuffle_window, [source.path])
    rate = read_rate(
        images=CHECKED_RATE,
        mean_bytes=mean_bytes,
        shards=len(source.shards),
        samples=len(source),
        window=window,
        processes=CHECKED_PROCESSES,
        loose=loose_images([source]),
    )
    return {
        "file_system": file_system(source.path),
        "shuffle_window": window,
        "processes": CHECKED_PROCESSES,
        **{f"{name}_per_second": value for name, value in vars(rate).items()},
    }


def describe_report(report: dict[str, Any]) -> str:
    """``reading_report`` as a line."""
    rate = ReadRate(**{name: report[f"{name}_per_second"] for name in ("images", "opens", "bytes")})
    window = report["shuffle_window"]
    order = f"windows of {window} shards" if window else "any order"
    return (
        f"{report['file_system'] or 'unknown file system'}, {order}; {report['processes']} loader processes at {rate}"
    )
