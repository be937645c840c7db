"""Files at URLs and on failing disks: downloaded once, retried, or refused with what to do."""

import errno
import logging
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from chat_server import Failure, send, stall
from data_world import DroppingServer, jpeg, serving, write_shards
from forked import context

from llm2clip_plugin.cli import main
from llm2clip_plugin.data import remote
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.remote import Downloads, take_retries
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source

BODY = os.urandom(300_000)
pread = os.pread


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The pauses between retries, which take no time."""
    waited: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    monkeypatch.setattr(remote, "_warned", [-1e9])
    take_retries()
    yield waited


def test_a_url_never_leaves_the_folder(tmp_path: Path) -> None:
    for url in (
        "http://h/..%2f..%2fetc%2fpasswd",
        "http://h/a/../..",
        "http://h/",
        "http://h/x?token=/../secret",
    ):
        path = Downloads(tmp_path / "cache").local_path(url)
        assert path.parent == tmp_path / "cache"
        assert "secret" not in path.name


def test_a_name_for_cards_and_reports_has_no_key() -> None:
    assert remote.public_name("https://h/set/rows.jsonl?token=secret") == "rows.jsonl"
    assert remote.public_name("/data/photos/") == "photos"
    assert remote.public_name("/data/what?.jsonl") == "what?.jsonl"


def test_tars_and_rows_at_urls_with_a_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The key, which may have slashes and dots as base64 has, is in no name and no message."""
    monkeypatch.setenv("LLM2CLIP_CACHE", str(tmp_path / "cache"))
    key = "?token=se/cr.et"
    files = {"/set/rows.jsonl" + key: b'{"image": "0.jpg", "caption": "a cat"}\n'}
    for path in write_shards(tmp_path / "data", [2, 1]).glob("*.tar"):
        files[f"/set/{path.name}{key}"] = path.read_bytes()
    with serving(DroppingServer(files)) as address:
        place = f"{address}/set"
        tars = open_source(SourceConfig(path=f"{place}/{{00000..00001}}.tar{key}"))
        assert [shard.name for shard in tars.shards] == ["00000", "00001"]
        assert tars[2].read_image() == jpeg(2)
        rows = open_source(SourceConfig(path=f"{place}/rows.jsonl{key}"))
        assert [shard.name for shard in rows.shards] == ["rows"]
        assert rows.name == "rows.jsonl"
        for path, message in (
            (f"{{00000..00001}}.tar{key}", f"{place}/"),
            (f"00002.tar{key}", f"no file at {place}/00002.tar (HTTP 404)"),
            (key, f"{place}/{{00000..00099}}.tar, with the query at the end"),
            (f"*.tar{key}", f"{place}/*.tar cannot be listed with a query"),
            (f"00000.tar?part={{0,1}}&{key[1:]}", "is the URL of several tars"),
        ):
            main(["data", "check", f"{place}/{path}"])
            printed = capsys.readouterr()
            assert message in printed.out + printed.err
            assert "cr.et" not in printed.out + printed.err


def test_what_is_computed_stays_in_the_folder_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as /cache, the one folder of a container that can be written."""
    monkeypatch.setenv("LLM2CLIP_CACHE", str(tmp_path / "cache"))
    assert remote.computed_folder("search") == tmp_path / "cache" / "search"
    monkeypatch.delenv("LLM2CLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remote.computed_folder("search") == tmp_path / "llm2clip" / "search"


def fetch_once(arguments: tuple[Path, str]) -> int:
    return Downloads(arguments[0]).fetch(arguments[1]).stat().st_size


def test_processes_share_one_download(tmp_path: Path) -> None:
    server = DroppingServer({"/a.tar": BODY})
    with serving(server) as address, context().Pool(3) as pool:
        # of a killed one
        Path(
            f"{Downloads(tmp_path).local_path(f'{address}/a.tar')}.partial"
        ).write_bytes(BODY[::-1])
        sizes = pool.map(fetch_once, [(tmp_path, f"{address}/a.tar")] * 3)
    assert sizes == [len(BODY)] * 3
    assert server.sent == len(BODY)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_broke(
    ranges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a line that always breaks before the end of the file; a server without ranges sends it
    once."""
    monkeypatch.setattr(remote, "RANGE", 70_000)
    server = DroppingServer(
        {"/a.tar": BODY}, drop_after=80_000, drops=99 * ranges, ranges=ranges
    )
    with serving(server) as address:
        assert Downloads(tmp_path).fetch(f"{address}/a.tar").read_bytes() == BODY
    assert server.sent == len(BODY)


def test_shards_on_another_filesystem(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in write_shards(tmp_path / "data", [2, 1]).glob("*.tar"):
        memory.pipe_file(f"/set/{path.name}", path.read_bytes())
    for url in ("memory://set/*.tar", "memory://set/"):
        source = open_source(
            SourceConfig(path=url, cache_folder=str(tmp_path / "cache"))
        )
        assert [shard.name for shard in source.shards] == ["00000", "00001"]
        assert source[2].read_image() == jpeg(2)


def test_a_set_larger_than_the_cache_is_read_by_workers(tmp_path: Path) -> None:
    """Shards are downloaded, evicted and downloaded again in the loader's processes; a later start
    downloads none."""
    folder = write_shards(tmp_path / "data", [4] * 4)
    files = {f"/{path.name}": path.read_bytes() for path in folder.glob("*.tar")}
    server = DroppingServer(files, drop_after=2_000, drops=3)
    with serving(server) as address:
        config = SourceConfig(
            path=f"{address}/{{00000..00003}}.tar",
            cache_folder=str(tmp_path / "cache"),
            cache_gb=2.5 * max(map(len, files.values())) / 1e9,
            shuffle_window=2,
        )
        source = open_source(config)
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
        before = server.sent
        assert open_source(config).shards == source.shards
        assert server.sent == before
        loader = PairLoader(
            PairDataset([source], [None], ImageConfig(size=8), seed=0),
            local_batch=8,
            workers=2,
        )
        batches = list(islice(loader, 4))
        assert sorted(key for batch in batches[:2] for key in batch["keys"]) == [
            f"{i:09d}" for i in range(16)
        ]
        assert server.sent > before


def test_nodes_share_an_index_and_captions_need_no_download(tmp_path: Path) -> None:
    files = {
        f"/{path.name}": path.read_bytes()
        for path in write_shards(tmp_path / "data", [4] * 2).glob("*.tar")
    }
    server = DroppingServer(files)
    with serving(server) as address:
        both = {
            "path": f"{address}/{{00000..00001}}.tar",
            "index_folder": str(tmp_path / "shared"),
        }
        nodes = [
            SourceConfig(**both, cache_folder=str(tmp_path / f"node{node}"))
            for node in range(2)
        ]
        first = open_source(nodes[0])
        sent = server.sent
        second = open_source(nodes[1])
        assert [second.captions(number) for number in range(8)] == [
            first.captions(number) for number in range(8)
        ]
        assert server.sent == sent
        assert second[0].read_image() == first[0].read_image()
        assert server.sent > sent  # its own copy, later than the index
        sent = server.sent
        assert open_source(nodes[1]).shards == open_source(nodes[0]).shards
        assert server.sent == sent


def failing(files: dict[str, bytes], failures: list[Failure]) -> DroppingServer:
    server = DroppingServer(files)
    server.failures = failures
    return server


def status(code: int, **headers: str) -> Failure:
    # no body, which an answer to HEAD must not have
    return lambda handler: send(handler, code, b"", **headers)


def test_overload_is_retried_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pauses: list[float]
) -> None:
    errors = [
        status(503),
        status(503),
        status(429, Retry_After="70"),
        status(429, Retry_After="70"),
        status(500),
    ]
    # HEAD tells the size; after a failure, GET does
    server = failing({"/a.tar": BODY}, errors)
    with serving(server) as address, caplog.at_level(logging.WARNING):
        assert Downloads(tmp_path).fetch(f"{address}/a.tar").read_bytes() == BODY
    assert take_retries() == len(pauses) >= 2
    assert take_retries() == 0
    assert 70.0 in pauses
    # at most one every 30 s
    assert len(caplog.messages) == 1
    assert "ClientResponseError: 503" in caplog.text


@pytest.mark.parametrize(
    "code, error",
    [(403, PermissionError), (404, FileNotFoundError), (400, ConnectionError)],
)
def test_a_refusal_is_said_at_once(
    code: int, error: type[Exception], tmp_path: Path
) -> None:
    server = failing({}, [status(code)] * 9)
    with (
        serving(server) as address,
        pytest.raises(error, match=rf"http.*a\.tar.*{code}"),
    ):
        Downloads(tmp_path).fetch(f"{address}/a.tar")
    assert server.asked <= 2
    assert take_retries() == 0


def test_a_server_that_is_gone_or_stalls_ends_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec raises FileNotFoundError for a refused connection, which says nothing about the
    file."""
    with serving(DroppingServer({})) as address:
        pass
    with pytest.raises(
        ConnectionError,
        match=r"failed 8 times in a row: http.*a\.tar: ClientConnector.*rerun",
    ):
        Downloads(tmp_path).fetch(f"{address}/a.tar")
    monkeypatch.setenv("LLM2CLIP_TIMEOUT", "0.2")
    server = failing({}, [stall] * 20)
    with (
        serving(server) as address,
        pytest.raises(ConnectionError, match="LLM2CLIP_TIMEOUT"),
    ):
        Downloads(tmp_path).fetch(f"{address}/a.tar")


@pytest.mark.parametrize(
    "body",
    [b"<html>log in</html>".ljust(20_000), bytes(20_480), b""],
    ids=["page", "zeros", ""],
)
def test_a_wrong_body_is_not_kept(body: bytes, tmp_path: Path) -> None:
    """The same command succeeds when the server has recovered."""
    files = {"/00000.tar": body}
    with serving(DroppingServer(files)) as address:
        config = SourceConfig(
            path=f"{address}/00000.tar", cache_folder=str(tmp_path / "cache")
        )
        with pytest.raises(ValueError, match="the copy is deleted"):
            open_source(config)
        files["/00000.tar"] = (
            write_shards(tmp_path / "data", [2]) / "00000.tar"
        ).read_bytes()
        assert open_source(config)[1].read_image() == jpeg(1)


class Disk:
    """The real disk, which counts reads of tars and cache shards and fails as often as ``failures``
    says."""

    def __init__(self) -> None:
        self.reads: list[tuple[str, int, int]] = []  # file name, size, offset
        self.failures: list[int] = []

    def pread(self, descriptor: int, size: int, offset: int) -> bytes:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name.endswith((".tar", ".safetensors")):
            self.reads.append((name, size, offset))
            if self.failures:
                number = self.failures.pop(0)
                raise OSError(number, os.strerror(number))
        return pread(descriptor, size, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(os, "pread", disk.pread)
    return disk


def source_of(folder: Path) -> Source:
    return open_source(SourceConfig(path=str(folder)))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_read_that_fails_for_a_while_is_repeated_with_the_file_opened_again(
    number: int, tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    source = source_of(write_shards(tmp_path, [2]))
    expected = source[1].read_image()
    before = source._file(0)._descriptor  # type: ignore[attr-defined]
    os.dup2(os.open(os.devnull, os.O_RDONLY), before)  # a stale handle
    disk.failures = [number, number]

    def stale(descriptor: int, size: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}") == os.devnull:
            raise OSError(number, os.strerror(number))
        return disk.pread(descriptor, size, offset)

    os.pread = stale  # the fixture of ``disk`` restores it
    assert source[1].read_image() == expected
    assert take_retries() == 3
    assert os.strerror(number) in caplog.text
    assert "00000.tar" in caplog.text
    assert "retrying" in caplog.text


def test_it_ends_in_an_error_that_names_the_file(tmp_path: Path, disk: Disk) -> None:
    source = source_of(write_shards(tmp_path, [2]))
    disk.failures = [errno.EIO] * 100
    with pytest.raises(
        ConnectionError,
        match=r"failed 8 times in a row: .*00000\.tar: OSError.*rerun the same",
    ):
        source[0].read_image()
    disk.failures = [errno.EACCES]
    with pytest.raises(PermissionError):
        source[0].read_image()
    assert take_retries() == 7
