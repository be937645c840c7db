"""WebDataset tars as img2dataset writes them: KEY.jpg with KEY.txt and/or KEY.json, read in any
order.

The index holds keys, texts and JSON, so that a tar is read for its images alone. Member names are
labels: none is used as a path.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_plugin.data.index import IndexFile, ShardRows, Shards, Table, open_index
from llm2clip_plugin.data.remote import (
    Downloads,
    Result,
    RetryingFile,
    SideFolder,
    has_suffix,
    is_url,
    list_urls,
    retried,
    stamp_of,
    stamps_of,
)
from llm2clip_plugin.data.samples import (
    BrokenSample,
    Sample,
    cores,
    map_in_order,
    parallel,
)
from llm2clip_plugin.data.sources import (
    BLOCK,
    BrokenShard,
    Source,
    SourceConfig,
    SourceFormat,
    common_folder,
    expand,
    how_to_make_tars,
    parse_object,
    scan_tar,
    shards_of,
    split_name,
)
from llm2clip_plugin.outside import without_queries
from llm2clip_plugin.progress import track

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# byte and size of the image; sizes of key, .txt and .json; start and size of these in the index's
# text
COLUMNS = 7
CRC = 4  # bytes, after the text of each sample
ABSENT = -1  # offset or size of a part that the sample does not have
OPEN_FILES = 256  # tars held open by one process
DOWNLOADS_AT_ONCE = 4
FEW = 16  # tars that are indexed in this process, without a pool

# paths or URLs, and the index of all, in the same order
OpenedTars = tuple[list[str], SideFolder, IndexFile]


class TarSource(Source):
    """Samples of tars in a folder, or of the local copies of tars at a URL; ``broken_shards`` as in
    ``open_source``."""

    def __init__(
        self,
        config: SourceConfig,
        broken_shards: dict[str, str] | None = None,
        opened: OpenedTars | None = None,
    ) -> None:
        # of a shard's number; the last used stay open
        self._file = lru_cache(OPEN_FILES)(self._make_file)
        self._downloads = config.downloads
        self.downloads_shards = is_url(config.path)
        self._opened = opened or open_tars(config, self._downloads, broken_shards)
        self._tars, self.side_folder, self._index = self._opened
        table = self._index.table
        super().__init__(config, shards_of(table.names, table.samples))
        self.stamps = table.stamps
        if not len(self) and not broken_shards:
            raise ValueError(
                f"{config.path}: no tar has an image, .txt or .json; "
                "a name's extension begins at its first dot, so 'a.b.jpg' is no .jpg: "
                "rename such members"
            )

    def __reduce__(self) -> tuple[type[TarSource], tuple[object, ...]]:
        return TarSource, (self.config, None, self._opened)

    def key(self, number: int) -> str:
        return self._row(number)[1]

    def files(self) -> dict[str, str]:
        names = [f"{shard.name}.tar" for shard in self.shards]
        return dict(zip(names, self._tars, strict=True))

    def picture_digests(self) -> dict[str, str]:
        """Also over the size of every picture, which the index has."""
        sizes = hashlib.sha256()
        for shard in range(len(self.shards)):
            sizes.update(self._index.columns_of(shard)[:, 1].tobytes())
        return {"sizes": sizes.hexdigest()[:12], **super().picture_digests()}

    def use_shard(self, shard: int, action: Callable[[Path], Result]) -> Result:
        """``action`` on the tar of a shard as a local file, downloaded if it is at a URL."""
        return self._downloads.use(self._tars[shard], action)

    def record(self, number: int) -> Sample:
        columns, key, text, fields = self._row(number)
        shard = self.place(number)[0]
        meta: dict[str, Any] = {}
        if fields is not None:
            meta = parse_object(fields, self.shards[shard].name, key, "its .json ")
        values = (
            meta if text is None else meta | {"txt": text.decode("utf-8", "replace")}
        )
        return Sample(key, values, meta, partial(self._image, shard, key, *columns[:2]))

    def _row(self, number: int) -> tuple[list[int], str, bytes | None, bytes | None]:
        """A sample's columns, key, .txt and .json."""
        columns, data = self._index.row(*self.place(number))
        key_bytes, text_bytes, fields_bytes = columns[2:5]
        crc = data[-CRC:]
        data = data[:-CRC]
        # ABSENT is below 0
        text_stop = key_bytes + max(text_bytes, 0)
        stop = text_stop + max(fields_bytes, 0)
        if zlib.crc32(data).to_bytes(CRC, "little") != crc or stop != len(data):
            raise ValueError(
                f"{self._index.path} is damaged (sample {number}); delete it and restart"
            )
        key = data[:key_bytes].decode()
        text = data[key_bytes:text_stop] if text_bytes >= 0 else None
        fields = data[text_stop:] if fields_bytes >= 0 else None
        return columns, key, text, fields

    def _image(self, shard: int, key: str, offset: int, size: int) -> bytes:
        """An image, whose header in the tar must be the sample's."""
        name = self.shards[shard].name
        if offset == ABSENT:
            raise BrokenSample(name, key, "no .jpg, .png or .webp in the tar")
        data = self._file(shard).read(BLOCK + size, offset - BLOCK)
        if len(data) != BLOCK + size:
            raise ValueError(f"{self._tars[shard]} was truncated while being read")
        if not is_header_of(data[:BLOCK], key, size):
            changed = (
                f"the tar has another member at byte {offset}: it was "
                "changed after it was indexed"
            )
            raise BrokenSample(
                name, key, f"{changed}; delete {self._index.path} and restart"
            )
        return data[BLOCK:]

    def _open(self, shard: int) -> int:
        """A descriptor of the tar, whose size must be the indexed one."""
        tar = self._tars[shard]
        expected = self.stamps[shard][0]
        descriptor = self._downloads.use(tar, lambda path: os.open(path, os.O_RDONLY))
        size = os.fstat(descriptor).st_size
        if size != expected:
            os.close(descriptor)
            advice = "restart"
            if is_url(tar):
                advice = f"delete {self._downloads.local_path(tar)} and restart"
            raise ValueError(
                f"{without_queries(tar)} was replaced: {size} bytes, {expected} when it was "
                f"indexed; {advice}"
            )
        return descriptor

    def _make_file(self, shard: int) -> RetryingFile:
        return RetryingFile(self._tars[shard], partial(self._open, shard))


def open_tars(
    config: SourceConfig, downloads: Downloads, broken: dict[str, str] | None
) -> OpenedTars:
    """The tars, downloaded from a URL, and indexed by one process of those that open them."""
    path = config.path
    base, tars = list_tars(path)
    if is_url(path):
        pattern = path[len(base) :]
    else:
        pattern = os.path.relpath(path, base or ".")
    spare = Path(config.index_folder) if config.index_folder else downloads.folder
    folder = SideFolder.of(base or ".", spare)
    digest = hashlib.sha256(pattern.encode()).hexdigest()

    def is_current(table: Table) -> bool:
        if table.names != list(tars):
            return False
        return len(_unchanged(table, tars, downloads)) == len(tars)

    index = open_index(
        folder,
        f"shards-{digest[:16]}.index",
        COLUMNS,
        is_current=is_current,
        build=partial(_build, tars, downloads, broken),
        doing=f"index {path}",
    )
    return [tars[shard] for shard in index.table.names], folder, index


def _unchanged(
    table: Table, tars: dict[str, str], downloads: Downloads
) -> dict[str, int]:
    """Number of each shard whose tar is the one indexed; copies from a URL may be evicted, or have
    another time."""
    files: dict[int, str] = {}
    for number, name in enumerate(table.names):
        if name in tars:
            tar = tars[name]
            files[number] = str(downloads.local_path(tar)) if is_url(tar) else tar
    unchanged: dict[str, int] = {}
    for number, stamp in zip(files, stamps_of([*files.values()]), strict=True):
        name = table.names[number]
        indexed = table.stamps[number]
        if stamp == indexed:
            unchanged[name] = number
        elif is_url(tars[name]):
            is_evicted = stamp is None
            if is_evicted or stamp[0] == indexed[0]:  # the size
                unchanged[name] = number
    return unchanged


def _build(
    tars: dict[str, str],
    downloads: Downloads,
    broken: dict[str, str] | None,
    old: IndexFile | None,
) -> Shards:
    """The rows of each tar, or its number in ``old`` if it is unchanged."""
    unchanged = _unchanged(old.table, tars, downloads) if old else {}
    todo = [tar for name, tar in tars.items() if name not in unchanged]
    job = partial(_index, downloads)
    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as threads:
        if any(map(is_url, todo)):
            results = map_in_order(threads, job, todo, ahead=2 * DOWNLOADS_AT_ONCE)
        else:
            results = parallel(job, todo, processes=cores() if len(todo) > FEW else 1)
        for name in track(tars, total=len(tars), label="index", unit="shards"):
            result = unchanged[name] if name in unchanged else next(results)
            if not isinstance(result, Exception):
                yield result if isinstance(result, int) else replace(result, name=name)
            elif broken is None:
                raise result
            else:
                broken[name] = str(result)


def _index(downloads: Downloads, tar: str) -> ShardRows | Exception:
    """The rows of one tar, or why there are none. A copy that is no tar is deleted."""
    try:
        return downloads.use(tar, index_tar)
    except (FileNotFoundError, PermissionError) as error:
        return error
    except BrokenShard as error:
        if not is_url(tar):
            return error
        downloads.local_path(tar).unlink(missing_ok=True)
        return BrokenShard(
            f"{without_queries(tar)}: {error}; the copy is deleted, so the next start downloads it "
            "again"
        )


def list_tars(path: str) -> tuple[str, dict[str, str]]:
    """``path``, or the longest folder or URL that all its tars share, and name -> path or URL of
    each, in order. A shard's name is its path relative to that folder, without ``.tar``. Raises
    ValueError for URLs that differ in their queries alone."""
    if is_url(path):
        tars = list_urls(path, ".tar")
    elif os.path.isdir(path):
        files = Path(path).rglob("*.tar")
        tars = sorted(str(file) for file in files if not file.name.startswith("."))
    else:
        tars = expand(path)
    if not tars:
        raise FileNotFoundError(f"no .tar files in {path}; {how_to_make_tars(path)}")
    places = tars
    if is_url(path):
        places = [tar.partition("?")[0] for tar in tars]
    base = path if os.path.isdir(path) else common_folder(places)
    tar_of: dict[str, str] = {}
    for tar, place in zip(tars, places, strict=True):
        if is_url(path):
            name = place[len(base) :].lstrip("/")
        else:
            name = os.path.relpath(tar, base or ".")
        name = name.removesuffix(".tar")
        if tar_of.get(name, tar) != tar:
            raise ValueError(
                f"{place} is the URL of several tars, which differ in their queries alone; "
                "download them to a folder, under names of their own"
            )
        tar_of[name] = tar
    return base, tar_of


def index_tar(path: Path) -> ShardRows:
    """The samples of a tar: rows of COLUMNS; of each sample the key, .txt and .json. Raises
    BrokenShard.

    Members with the same key are a sample, in order of first appearance; one whose part repeats
    starts another sample. Hidden files (macOS's ``._x.jpg``) and members other than an image, .txt
    and .json are ignored.
    """
    stamp, samples = retried(lambda: (stamp_of(path), _samples(path)), str(path))
    rows = []
    text = bytearray()
    for key, parts in samples:
        texts = [key.encode(), parts.get("txt"), parts.get("json")]
        sample_bytes = b"".join(filter(None, texts))
        sample_bytes += zlib.crc32(sample_bytes).to_bytes(CRC, "little")
        sizes = [ABSENT if part is None else len(part) for part in texts]
        image = parts.get("image", (ABSENT, 0))
        rows.append([*image, *sizes, len(text), len(sample_bytes)])
        text += sample_bytes
    rows_NC = np.array(rows, dtype=np.int64).reshape(-1, COLUMNS)
    return ShardRows(path.name, stamp, rows_NC, bytes(text))


def _samples(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Keys and parts: of an image byte and size in the tar, of .txt and .json the content."""
    samples: list[tuple[str, dict[str, Any]]] = []
    latest: dict[str, dict[str, Any]] = {}
    with open(path, "rb") as file:
        for member in scan_tar(path):
            key, extension = split_name(member.name)
            part = "image" if extension in IMAGE_EXTENSIONS else extension
            if part not in ("image", "txt", "json") or key.rpartition("/")[2] == "":
                continue
            if key not in latest or part in latest[key]:
                latest[key] = {}
                samples.append((key, latest[key]))
            content: Any = (member.offset_data, member.size)
            if part != "image":
                file.seek(member.offset_data)
                content = file.read(member.size)
            latest[key][part] = content
    return samples


def is_header_of(header: bytes, key: str, size: int) -> bool:
    """Whether the block before a member's content is the header of one of ``size`` bytes of the
    sample ``key``. Only short ASCII names are compared: others are in a block of their own."""
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
    except tarfile.TarError:
        return False
    if member.size not in (size, 0):  # 0: pax records may hold the size
        return False
    if not key.isascii() or len(key) >= 80:
        return True
    member_key, _ = split_name(member.name)
    return member_key == key


def _may_be_tars(path: str) -> bool:
    """Whether ``path`` is a tar, a wildcard or braces, or a folder or URL, which may hold
    anything."""
    if has_suffix(path, ".tar") or "*" in path or "{" in path:
        return True
    return os.path.isdir(path) or is_url(path)


SOURCE = SourceFormat(
    name="webdataset",
    help="a .tar, or a folder of .tar shards",
    recognizes=_may_be_tars,
    open=TarSource,
    fallback=True,
)
