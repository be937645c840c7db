import multiprocessing
import os
import time
from pathlib import Path

import pytest
from data_world import DroppingServer, jpeg, serving, write_shards

from llm2clip_plugin.data import remote as downloads_module
from llm2clip_plugin.data import remote as retry_module
from llm2clip_plugin.data.remote import Downloads, expand_braces
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.hub import Retry

BODY = os.urandom(300_000)


def downloads(folder: Path, *, tries: int = 8, limit_bytes: int = 0) -> Downloads:
    return Downloads(folder, Retry(tries=tries, first_pause=0.01), limit_bytes=limit_bytes)


def names(folder: Path) -> list[str]:
    return sorted(path.name.split("-", 1)[1] for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_braces() -> None:
    assert expand_braces("s/{08..11}.tar") == ["s/08.tar", "s/09.tar", "s/10.tar", "s/11.tar"]
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand_braces("plain") == ["plain"]
    with pytest.raises(ValueError, match="a range"):
        expand_braces("{x}")


def test_a_dropped_download_resumes_by_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads_module, "LARGEST_RANGE", 100_000)
    monkeypatch.setattr(downloads_module, "SMALLEST_RANGE", 20_000)
    server = DroppingServer({"/a.tar": BODY}, drop_after=50_000, drops=3)
    with serving(server) as address:
        path = downloads(tmp_path).fetch(f"{address}/a.tar")
        assert path.read_bytes() == BODY
        assert names(tmp_path) == ["a.tar"]
        starts = [int(asked.removeprefix("bytes=").split("-")[0]) for _, asked in server.requests]
        assert starts == sorted(starts) and starts[-1] > 0  # never back to the beginning
        assert server.sent < len(BODY) + 3 * 50_000 + 1  # only the dropped ranges came twice
        before = len(server.requests)
        assert downloads(tmp_path).fetch(f"{address}/a.tar") == path and len(server.requests) == before


def test_what_came_is_kept_when_it_gives_up_and_used_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads_module, "LARGEST_RANGE", 50_000)
    monkeypatch.setattr(downloads_module, "SMALLEST_RANGE", 50_000)
    server = DroppingServer({"/a.tar": BODY}, drop_after=10_000)
    with serving(server) as address:
        asked = []
        cat = downloads_module.open_filesystem

        def dying(url: str):  # the connection is there for two ranges, then gone
            filesystem, path = cat(url)
            asked.append(url)
            server.drops = 0 if len(server.requests) < 2 else 1000
            return filesystem, path

        monkeypatch.setattr(downloads_module, "open_filesystem", dying)
        server.drops = 0
        whole = server.answer

        def answer(handler, *, body: bool) -> None:
            if len(server.requests) >= 2:
                server.drops = 1000
            whole(handler, body=body)

        server.answer = answer  # type: ignore[method-assign]
        with pytest.raises(ConnectionError, match=r"3 times in a row: .*at byte 100000 of 300000.*rerun the same"):
            downloads(tmp_path, tries=3).fetch(f"{address}/a.tar")
        assert names(tmp_path) == ["a.tar.partial", "a.tar.partial.json"]  # no file has the final name
        server.answer = whole  # type: ignore[method-assign]
        server.drops, server.requests = 0, []
        assert downloads(tmp_path).fetch(f"{address}/a.tar").read_bytes() == BODY
        assert server.requests[0][1].startswith("bytes=100000-")


def fetch_slowly(arguments: tuple[Path, str]) -> None:
    downloads_module.LARGEST_RANGE = 1000
    downloads(arguments[0]).fetch(arguments[1])


def test_a_killed_download_resumes(tmp_path: Path) -> None:
    """SIGKILL in the middle: no file has the final name, no lock remains, and no byte is requested again."""
    server = DroppingServer({"/a.tar": BODY})
    with serving(server) as address:
        process = multiprocessing.get_context("spawn").Process(
            target=fetch_slowly, args=[(tmp_path, f"{address}/a.tar")]
        )
        process.start()
        while server.sent < 20_000:
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()
        process.join()
        there = downloads(tmp_path).local_path(f"{address}/a.tar")
        assert not there.exists()
        kept = there.with_name(there.name + ".partial").stat().st_size
        server.requests = []
        assert downloads(tmp_path).fetch(f"{address}/a.tar").read_bytes() == BODY
        assert server.requests == [("/a.tar", f"bytes={kept}-{len(BODY) - 1}")]


def test_a_partial_download_of_an_older_file_starts_again(tmp_path: Path) -> None:
    with serving(DroppingServer({"/a.tar": BODY})) as address:
        there = downloads(tmp_path)
        target = there.local_path(f"{address}/a.tar")
        target.with_name(target.name + ".partial").write_bytes(b"old" * 1000)
        target.with_name(target.name + ".partial.json").write_text('{"etag": "old"}')
        assert there.fetch(f"{address}/a.tar").read_bytes() == BODY


def test_a_server_without_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads_module, "LARGEST_RANGE", 100_000)
    with serving(DroppingServer({"/a.tar": BODY}, ranges=False)) as address:
        assert downloads(tmp_path).fetch(f"{address}/a.tar").read_bytes() == BODY


def test_a_missing_file_and_an_unknown_protocol_are_not_retried(tmp_path: Path) -> None:
    server = DroppingServer({})
    with serving(server) as address, pytest.raises(FileNotFoundError, match=r"no file at http.*none\.tar"):
        downloads(tmp_path).fetch(f"{address}/none.tar")
    with pytest.raises(ValueError, match=r"cannot open nosuch://x/a\.tar"):
        downloads(tmp_path).fetch("nosuch://x/a.tar")


def test_an_unreachable_server_is_retried(tmp_path: Path) -> None:
    """fsspec raises FileNotFoundError for a refused connection, which says nothing about the file."""
    server = DroppingServer({"/a.tar": BODY})
    with serving(server) as address:
        pass
    with pytest.raises(ConnectionError, match=r"failed 3 times in a row: http.*a\.tar: ClientConnector"):
        downloads(tmp_path, tries=3).fetch(f"{address}/a.tar")


def test_least_recently_used_shards_are_evicted(tmp_path: Path) -> None:
    files = {f"/{number}.tar": bytes(1000) for number in range(4)}
    with serving(DroppingServer(files)) as address:
        there = downloads(tmp_path, limit_bytes=2500)
        for number, url in enumerate(files):
            path = there.fetch(address + url)
            os.utime(path, (number, number))
    assert names(tmp_path) == ["2.tar", "3.tar"]


def test_a_url_never_leaves_the_folder(tmp_path: Path) -> None:
    for url in ("http://h/..%2f..%2fetc%2fpasswd", "http://h/a/../..", "http://h/", "http://h/x?token=/../secret"):
        path = downloads(tmp_path / "cache").local_path(url)
        assert path.parent == tmp_path / "cache" and "secret" not in path.name


def fetch_once(arguments: tuple[Path, str]) -> int:
    return downloads(arguments[0]).fetch(arguments[1]).stat().st_size


def test_processes_share_one_download(tmp_path: Path) -> None:
    server = DroppingServer({"/a.tar": BODY})
    with serving(server) as address, multiprocessing.get_context("spawn").Pool(3) as pool:
        sizes = pool.map(fetch_once, [(tmp_path, f"{address}/a.tar")] * 3)
    assert sizes == [len(BODY)] * 3 and server.sent == len(BODY)


def test_shards_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module.time, "sleep", lambda seconds: None)
    folder = write_shards(tmp_path / "data", [2, 3])
    files = {f"/set/{path.name}": path.read_bytes() for path in folder.glob("*.tar")}
    server = DroppingServer(files, drop_after=5_000, drops=4)
    with serving(server) as address:
        config = SourceConfig(path=f"{address}/set/{{00000..00001}}.tar", cache_folder=str(tmp_path / "cache"))
        source = open_source(config)
        assert [(shard.name, shard.size) for shard in source.shards] == [("00000", 2), ("00001", 3)]
        assert [source[i].read_image() for i in range(5)] == [jpeg(i) for i in range(5)]
    reopened = open_source(config)  # the server is gone: all is in the cache
    assert reopened[4] == source[4]


def test_shards_on_another_filesystem(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in write_shards(tmp_path / "data", [2, 1]).glob("*.tar"):
        memory.pipe_file(f"/set/{path.name}", path.read_bytes())
    for url in ("memory://set/*.tar", "memory://set/"):
        source = open_source(SourceConfig(path=url, cache_folder=str(tmp_path / "cache")))
        assert [shard.name for shard in source.shards] == ["00000", "00001"] and source[2].read_image() == jpeg(2)
    with pytest.raises(FileNotFoundError, match="a server that does not list folders, name the files"):
        open_source(SourceConfig(path="memory://nothing/", cache_folder=str(tmp_path / "cache")))


def test_a_table_with_images_over_http(tmp_path: Path) -> None:
    table = b'{"id": "a", "image": "sub/1.jpg", "caption": "x"}\n{"id": "b", "image": "none.jpg", "caption": "y"}\n'
    with serving(DroppingServer({"/d/t.jsonl": table, "/d/sub/1.jpg": jpeg(1)}, drop_after=100, drops=1)) as address:
        source = open_source(SourceConfig(path=f"{address}/d/t.jsonl", cache_folder=str(tmp_path)))
        assert source[0].read_image() == jpeg(1)
        with pytest.raises(ValueError, match=r"no image 'none\.jpg'"):
            source[1].read_image()


def test_a_set_larger_than_the_cache_is_read_by_workers(tmp_path: Path) -> None:
    """Shards are downloaded, evicted and downloaded again in the loader's processes; their indexes stay."""
    from llm2clip_plugin.data.images import ImageConfig
    from llm2clip_plugin.data.loader import make_loader
    from llm2clip_plugin.data.pairs import PairDataset

    folder = write_shards(tmp_path / "data", [4] * 4)
    files = {f"/{path.name}": path.read_bytes() for path in folder.glob("*.tar")}
    one = max(len(data) for data in files.values())
    server = DroppingServer(files, drop_after=2_000, drops=3)
    with serving(server) as address:
        config = SourceConfig(
            path=f"{address}/{{00000..00003}}.tar",
            cache_folder=str(tmp_path / "cache"),
            cache_gb=2.5 * one / 1e9,
            shuffle_window=2,
        )
        source = open_source(config)
        kept = [path for path in (tmp_path / "cache").glob("*.tar") if not path.name.startswith(".")]
        assert len(kept) == 2
        before = server.sent
        assert open_source(config).shards == source.shards and server.sent == before
        loader = make_loader(PairDataset([source], [None], ImageConfig(size=8), seed=0), local_batch=8, workers=2)
        batches = [batch for batch, _ in zip(loader, range(4), strict=False)]
        assert sorted(key for batch in batches[:2] for key in batch["keys"]) == [f"{i:09d}" for i in range(16)]
        assert server.sent > before


def test_a_shard_replaced_at_its_url_is_noticed(tmp_path: Path) -> None:
    files = {"/00000.tar": (write_shards(tmp_path / "a", [3]) / "00000.tar").read_bytes()}
    with serving(DroppingServer(files)) as address:
        config = SourceConfig(path=f"{address}/00000.tar", cache_folder=str(tmp_path / "cache"))
        local = open_source(config).config.downloads.local_path(config.path)
        local.unlink()
        files["/00000.tar"] = (write_shards(tmp_path / "b", [12]) / "00000.tar").read_bytes()
        with pytest.raises(ValueError, match=r"was replaced: \d+ bytes, \d+ when it was indexed; delete "):
            open_source(config)[0]
