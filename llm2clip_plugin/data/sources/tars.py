"""WebDataset tars as img2dataset writes them: KEY.jpg with KEY.txt and/or KEY.json, read in any order."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from llm2clip_plugin.console import track
from llm2clip_plugin.data.index import (
    ABSENT,
    BLOCK,
    COLUMNS,
    IMAGE_EXTENSIONS,
    BrokenShard,
    IndexFile,
    Part,
    ShardRows,
    Table,
    index_tar,
    is_header_of,
    open_index,
    stamp_of,
    stamps_of,
)
from llm2clip_plugin.data.remote import (
    Downloads,
    Result,
    RetryingFile,
    SideFolder,
    expand_braces,
    has_suffix,
    is_network,
    is_url,
    list_urls,
)
from llm2clip_plugin.data.samples import BrokenSample, Sample
from llm2clip_plugin.data.sources.base import Source, SourceConfig, SourceFormat, shards_of
from llm2clip_plugin.data.workers import cores, map_in_order, parallel
from llm2clip_plugin.options import command

# The tars of a path or URL, and the folder that they are in.

LOOKED_AT = 10_000  # files of a folder without tars


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
    return path if os.path.isdir(path) else _common_folder(tars)


def data_folder(path: str) -> Path:
    """The local folder of the data at ``path``, which shard names are relative to and caches are kept in.

    For braces and wildcards that match several folders it is their longest common one. Raises ValueError for a URL.
    """
    if is_url(path):
        raise ValueError(f"{path} is not a local folder")
    if os.path.isdir(path):
        return Path(path)
    return Path(_common_folder(_expand(path)) or path[: path.startswith("/")])


def _expand(pattern: str) -> list[str]:
    """Local paths that match braces and wildcards; a pattern without a match is returned unchanged."""
    return [
        path
        for one in expand_braces(pattern)
        for path in (glob.has_magic(one) and sorted(glob.glob(one, recursive=True))) or [one]
    ]


def _common_folder(files: Sequence[str]) -> str:
    """The longest folder that all ``files`` are below; "" if they share none."""
    folders = [file.rpartition("/")[0].split("/") for file in files]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "/".join(parts[0] for parts in same)


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


# The tars of a source with the one index of all of them.

DOWNLOADS_AT_ONCE = 4
FEW = 16  # tars that are indexed in this process, without a pool


@dataclass(frozen=True)
class TarSet:
    """Tars and their index, in the same order."""

    tars: tuple[str, ...]  # paths or URLs
    side_folder: SideFolder
    index: IndexFile


def open_tars(path: str, downloads: Downloads, broken: dict[str, str] | None) -> TarSet:
    """The tars of ``path``, downloaded if they are at a URL and indexed, by one process of those that open them.

    Raises FileNotFoundError without tars, BrokenShard for a broken one; with ``broken``, these are noted there
    (name -> reason) and left out.
    """
    listed = list_tars(path)
    tars, base = dict(listed), base_folder(path, [tar for _, tar in listed])
    pattern = path[len(base) :] if is_url(path) else os.path.relpath(path, base or ".")
    folder = SideFolder.of(base or ".", downloads.folder)
    index = open_index(
        folder,
        f"shards-{hashlib.sha256(pattern.encode()).hexdigest()[:16]}.index",
        COLUMNS,
        is_current=lambda table: table.names == list(tars) and _unchanged(table, tars, downloads) == set(tars),
        build=partial(_build, tars, downloads, broken),
        doing=f"index {path}",
    )
    return TarSet(tuple(tars[shard] for shard in index.table.names), folder, index)


def _unchanged(table: Table, tars: dict[str, str], downloads: Downloads) -> set[str]:
    """Names of the shards whose tars are those that were indexed; the copy of one at a URL may have been evicted."""
    names = [name for name in table.names if name in tars]
    files = [str(downloads.local_path(tars[name])) if is_url(tars[name]) else tars[name] for name in names]
    expected = dict(zip(table.names, table.stamps, strict=True))
    return {
        name
        for name, stamp in zip(names, stamps_of(files), strict=True)
        if stamp == expected[name] or (stamp is None and is_url(tars[name]))
    }


def _build(
    tars: dict[str, str], downloads: Downloads, broken: dict[str, str] | None, old: IndexFile | None
) -> Iterator[ShardRows]:
    """The rows of each tar, from ``old`` if it is unchanged."""
    known = _unchanged(old.table, tars, downloads) if old else set()
    place = {name: number for number, name in enumerate(old.table.names)} if old else {}
    todo = [tar for name, tar in tars.items() if name not in known]
    job = partial(_index, downloads)
    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as threads:
        if any(map(is_url, todo)):
            results = map_in_order(threads, job, todo, ahead=2 * DOWNLOADS_AT_ONCE)
        else:
            results = parallel(job, todo, processes=cores() if len(todo) > FEW else 1)
        for name in track(tars, total=len(tars), label="index", unit="shards"):
            if old and name in known:
                yield old.shard(place[name])
                continue
            result = next(results)
            if isinstance(result, ShardRows):
                yield replace(result, name=name)
            elif broken is None:
                raise result
            else:
                broken[name] = str(result)


def _index(downloads: Downloads, tar: str) -> ShardRows | Exception:
    """The rows of one tar, or why there are none. A copy that is no tar is deleted."""
    try:
        return use_tar(downloads, tar, _rows)
    except (FileNotFoundError, PermissionError) as error:
        return error
    except BrokenShard as error:
        if is_url(tar):
            downloads.forget(tar)
            return BrokenShard(f"{tar}: {error}; the copy is deleted, so the next start downloads it again")
        return error


def _rows(path: Path) -> ShardRows:
    stamp = stamp_of(path)
    return ShardRows("", stamp, *index_tar(path))


def use_tar(downloads: Downloads, tar: str, action: Callable[[Path], Result]) -> Result:
    """``action`` on a tar as a local file, downloaded if it is at a URL.

    Raises FileNotFoundError if there is no such tar, PermissionError if access is denied, ConnectionError if its
    download fails.
    """
    if is_url(tar):
        return downloads.use(tar, action)
    if not os.path.isfile(tar):
        raise FileNotFoundError(f"no file at {tar}")
    return action(Path(tar))


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
        self._files: OrderedDict[int, RetryingFile] = OrderedDict()  # shard number -> its tar, last used last
        self._downloads = config.downloads
        self._set = opened or open_tars(config.path, self._downloads, broken_shards)
        table = self._set.index.table
        super().__init__(config, shards_of(table.names, table.samples))
        self.side_folder, self.stamps = self._set.side_folder, table.stamps
        if not len(self) and not broken_shards:
            raise ValueError(
                f"{config.path}: none of the {len(self.shards)} tars has an image, .txt or .json member; a member's "
                "key ends at its first dot (WebDataset's rule), so 'a.b.jpg' is no .jpg: rename such members"
            )

    def __reduce__(self) -> tuple[type[TarSource], tuple[SourceConfig, None, TarSet]]:
        return TarSource, (self.config, None, self._set)

    def fetch(self, shard: int) -> None:
        tar = self._set.tars[shard]
        if is_url(tar):
            self._downloads.fetch(tar)
        elif self._on_network:
            file = RetryingFile(tar)
            for start in range(0, self.stamps[shard][0], PIECE):
                file.read(PIECE, start)

    def bytes_to_fetch(self, shards: Iterable[int]) -> int:
        return sum(self.stamps[shard][0] for shard in shards if self._on_network)

    @cached_property
    def _on_network(self) -> bool:
        return is_network(self.path)

    def key(self, number: int) -> str:
        return self._set.index.row(*self.place(number))[1].decode()

    def use_shard(self, shard: int, action: Callable[[Path], Result]) -> Result:
        """``action`` on the tar of a shard as a local file, downloaded if it is at a URL."""
        return use_tar(self._downloads, self._set.tars[shard], action)

    def record(self, number: int, *, image: bool = False) -> Sample:
        shard, within = self.place(number)
        columns, text = self._set.index.row(shard, within)
        key, name = text.decode(), self.shards[shard].name
        picture, caption, fields = zip(columns[0:6:2], columns[1:6:2], strict=True)  # (offset, size) of each part
        wanted = [part for part in (fields, caption, *[picture] * image) if part[0] != ABSENT]
        contents = self._read(shard, key, wanted)
        meta: dict[str, Any] = {}
        if fields in contents:
            try:
                meta = json.loads(contents[fields])
            except (ValueError, RecursionError) as error:
                raise BrokenSample(name, key, f"its .json is not valid JSON: {error}") from error
            if not isinstance(meta, dict):
                raise BrokenSample(name, key, f"its .json contains a {type(meta).__name__}, expected an object")
        values = meta
        if caption in contents:
            values = {**meta, "txt": contents[caption].decode("utf-8", "replace")}
        return Sample(key, values, meta, partial(self._image, shard, key, picture, contents.get(picture)))

    def _image(self, shard: int, key: str, part: Part, data: bytes | None) -> bytes:
        """The image, which ``data`` is if it was read with the sample."""
        if part[0] == ABSENT:
            raise BrokenSample(self.shards[shard].name, key, "no .jpg, .png or .webp in the tar")
        return self._read(shard, key, [part])[part] if data is None else data

    def _read(self, shard: int, key: str, parts: Sequence[Part]) -> dict[Part, bytes]:
        """Parts of a sample, neighbors in one read. BrokenSample unless their headers in the tar are the sample's."""
        contents: dict[Part, bytes] = {}
        for span in join_parts(parts):
            start, stop = span[0][0] - BLOCK, sum(span[-1])
            data = self._file(shard).read(stop - start, start)
            if len(data) != stop - start:
                raise ValueError(f"{self._set.tars[shard]} was truncated while being read")
            for offset, size in span:
                at = offset - start
                if not is_header_of(data[at - BLOCK : at], key, size):
                    raise BrokenSample(
                        self.shards[shard].name,
                        key,
                        f"the tar has another member at byte {offset}: it was changed after it was indexed; delete "
                        f"{self._set.index.path} and restart",
                    )
                contents[offset, size] = data[at : at + size]
        return contents

    def _file(self, shard: int) -> RetryingFile:
        if shard not in self._files:
            self._files[shard] = RetryingFile(self._set.tars[shard], partial(self._open, shard))
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _open(self, shard: int) -> int:
        """A descriptor of the tar, whose size must be the indexed one."""
        tar, expected = self._set.tars[shard], self.stamps[shard][0]
        descriptor = use_tar(self._downloads, tar, lambda path: os.open(path, os.O_RDONLY))
        size = os.fstat(descriptor).st_size
        if size != expected:
            os.close(descriptor)
            copy = f"delete {self._downloads.local_path(tar)} and " if is_url(tar) else ""
            raise ValueError(f"{tar} was replaced: {size} bytes, {expected} when it was indexed; {copy}restart")
        return descriptor


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
