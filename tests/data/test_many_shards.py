"""Hundreds of shards: what a process keeps open is bounded, and a later start reads no captions."""

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
from data_world import LengthEncoder, jpeg, write_tar
from forked import context

from llm2clip_plugin.data import cache as cache_module
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.check import CheckConfig, check_data
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source, tars
from llm2clip_plugin.data.sources.tars import TarSource
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.text.config import PairsConfig
from llm2clip_plugin.text.embed import embed_source
from llm2clip_plugin.text.pairs import open_pairs, survey

PIXELS = jpeg(0, (16, 16))


def write_tiny_tars(
    folder: Path, count: int, *, samples: int = 1, word: str = "picture"
) -> Path:
    for shard in range(count):
        members = []
        for sample in range(samples):
            key = f"{shard:05d}{sample:04d}"
            text = json.dumps(
                {
                    "caption": f"{word} {key}",
                    "long_caption": f"a long text about {word} {key}",
                }
            )
            members += [(f"{key}.jpg", PIXELS), (f"{key}.json", text.encode())]
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def embed(path: Path | str, cache: Path, **options: Any) -> Source:
    source = open_source(SourceConfig(path=str(path), **options))
    encoder = cast(Any, LengthEncoder())
    embed_source(source, encoder, cache, quiet=True)
    return source


def open_now() -> tuple[int, int]:
    """Descriptors and memory maps of this process."""
    return len(os.listdir("/proc/self/fd")), len(
        Path("/proc/self/maps").read_text().splitlines()
    )


@contextmanager
def open_files_limit(more: int) -> Iterator[None]:
    """At most ``more`` descriptors than now."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + more, before[1])
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def use_everything(folder: Path) -> tuple[int, int]:
    """Embed, check, load with two workers and form pairs; the most descriptors and maps after a
    shard was used."""
    source = embed(folder, folder / "cache")
    assert check_data(CheckConfig(path=str(folder), workers=2))["fit_for_training"]
    cache = EmbeddingCache.open(folder / "cache")
    cache.check(source, full=True)
    dataset = PairDataset([source], [cache], ImageConfig(size=8), seed=0)
    before = open_now()[0]
    batches = islice(PairLoader(dataset, local_batch=10, workers=2), len(source) // 10)
    assert len({key for batch in batches for key in batch["keys"]}) == len(source)
    del batches
    until = time.monotonic() + 60
    # tensors of the loader's processes are descriptors
    while open_now()[0] > before + 8 and time.monotonic() < until:
        time.sleep(0.05)
    config = PairsConfig(data=(str(folder),))
    (pairs,) = open_pairs(config)
    assert survey(pairs).usable == {"short:long": len(source)}
    descriptors = maps = 0
    for number in range(len(source)):
        key, captions = source.captions(number)
        assert source[number].read_image() == PIXELS
        assert cache.rows(*source.locate(number), captions, key=key)[0, 0] == len(
            captions[0].text
        )
        descriptors, maps = (
            max(pair) for pair in zip((descriptors, maps), open_now(), strict=True)
        )
    return descriptors, maps


def test_open_files_and_maps_do_not_grow_with_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "OPEN_FILES", 8)
    monkeypatch.setattr(cache_module, "OPEN_SHARDS", 8)
    use_everything(write_tiny_tars(tmp_path / "warm", 10))
    few = use_everything(write_tiny_tars(tmp_path / "few", 30))
    with open_files_limit(120):  # torch sends a tensor from a worker as a descriptor
        many = use_everything(write_tiny_tars(tmp_path / "many", 300))
    # of 270 more shards; what a loader's processes sent may stay open for a while, and allocators
    # map a little memory now and then
    assert many[0] <= few[0] + 60
    assert many[1] <= few[1] + 60


def test_a_later_start_reads_no_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = embed(write_tiny_tars(tmp_path, 20), tmp_path / "cache")

    def refuse(*arguments: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(Source, "record", refuse)
    monkeypatch.setattr(TarSource, "record", refuse)
    monkeypatch.setattr(tars, "index_tar", refuse)
    opened = set()
    open_shard = EmbeddingCache._open_shard
    monkeypatch.setattr(
        EmbeddingCache,
        "_open_shard",
        lambda cache, name: opened.add(name) or open_shard(cache, name),
    )
    again = open_source(SourceConfig(path=str(tmp_path)))
    assert again.shards == source.shards
    EmbeddingCache.open(tmp_path / "cache").check(again)
    embed(tmp_path, tmp_path / "cache")
    assert not opened


def test_digests_of_other_fields_are_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of all captions also fits a run that reads one field: compared in full once, then
    index_module."""
    read: list[int] = []
    get = Source.__getitem__
    monkeypatch.setattr(
        Source,
        "__getitem__",
        lambda source, number: read.append(number) or get(source, number),
    )
    embed(write_tiny_tars(tmp_path / "data", 3), tmp_path / "cache")
    cache = EmbeddingCache.open(tmp_path / "cache")
    one_field = SourceConfig(path=str(tmp_path / "data"), fields=("caption=short",))
    for expected in ([0, 1, 2], []):
        read.clear()
        cache.check(open_source(one_field))
        assert read == expected
    with pytest.raises(
        ContractError, match=r"caption 'pic\w+ 0+' \(hash \w{16}\) was not embedded"
    ):
        embed(tmp_path / "data", tmp_path / "other", fields=("long_caption=long",))
        EmbeddingCache.open(tmp_path / "other").check(open_source(one_field))


def test_a_changed_tar_is_compared_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embed(write_tiny_tars(tmp_path / "data", 4), tmp_path / "cache")
    write_tiny_tars(tmp_path / "other", 2, word="paintin")
    (tmp_path / "other" / "00001.tar").replace(tmp_path / "data" / "00001.tar")
    changed = open_source(SourceConfig(path=str(tmp_path / "data")))
    with pytest.raises(
        ContractError,
        match=r"00001\.safetensors: sample '000010000': caption 'paintin 000010000'",
    ):
        EmbeddingCache.open(tmp_path / "cache").check(changed)
    assert not caplog.records


def start(folder: str) -> tuple[int, int, str]:
    """A start, in its own process: how many tars it indexed, how many captions it read, and what it
    said."""
    counts = {"scans": 0, "captions": 0}
    index = tars.index_tar
    get = Source.__getitem__

    def counted_index(path: Any) -> Any:
        counts["scans"] += 1
        time.sleep(0.05)
        return index(path)

    def counted_get(source: Source, number: int) -> Any:
        counts["captions"] += 1
        return get(source, number)

    tars.index_tar = counted_index
    tars.FEW = 1000
    Source.__getitem__ = counted_get
    said = io.StringIO()
    ready = Path(folder) / "ready"
    (ready / str(os.getpid())).touch()
    deadline = time.monotonic() + 120
    while len(list(ready.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    with redirect_stderr(said):
        source = open_source(SourceConfig(path=folder, fields=("caption=short",)))
        EmbeddingCache.open(Path(folder) / "cache").check(source)
    return counts["scans"], counts["captions"], said.getvalue()


def test_processes_that_start_at_once_share_the_work(tmp_path: Path) -> None:
    folder = write_tiny_tars(tmp_path, 40, samples=5)
    embed(folder, folder / "cache")
    for path in (folder / ".llm2clip").iterdir():
        path.unlink()
    (folder / "ready").mkdir()
    with context().Pool(3) as pool:
        scans, captions, said = zip(
            *pool.map(start, [str(folder)] * 3, chunksize=1), strict=True
        )
    assert sum(scans) == 40
    assert sum(captions) == 200
    assert "waiting for another process to index" in "".join(said)


def test_the_processes_of_a_killed_reader_end(tmp_path: Path) -> None:
    program = """
import os, sys, time
from llm2clip_plugin.data.samples import parallel

def work(number):
    with open(f"{sys.argv[1]}/{os.getpid()}", "w"):
        time.sleep(600)

list(parallel(work, range(2), processes=2))
"""
    reader = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    reader.kill()
    reader.wait()
    workers = [Path("/proc", path.name, "cmdline") for path in tmp_path.iterdir()]

    def running() -> bool:
        # a zombie has an empty one
        return any(path.exists() and path.read_bytes() for path in workers)

    while running() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(workers) == 2
    assert not running()


def test_a_table_keeps_its_index_and_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"id": f"k{n}", "image": f"{n}.jpg", "caption": f"picture {n}"}
        for n in range(5)
    ]
    chats = [
        {**row, "conversations": [{"from": "gpt", "value": row["caption"]}]}
        for row in rows
    ]
    (tmp_path / "t.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "t.json").write_text(json.dumps([*chats, {"id": "text only"}]))
    for name in ("t.jsonl", "t.json"):
        source = embed(tmp_path / name, tmp_path / f"cache-{name}")
        with monkeypatch.context() as patch:
            patch.setattr(
                type(source), "read_rows", lambda *arguments: pytest.fail("read again")
            )
            again = open_source(SourceConfig(path=str(tmp_path / name)))
            pickled = pickle.loads(pickle.dumps(again))
            patch.setattr(
                Source, "__getitem__", lambda *arguments: pytest.fail("read again")
            )
            EmbeddingCache.open(tmp_path / f"cache-{name}").check(again)
        assert [s[4].key for s in (source, again, pickled)] == ["k4"] * 3
        assert [s[n].captions for s in (source, again) for n in (0, 4)] == [
            source[0].captions,
            source[4].captions,
        ] * 2
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows[::-1])))
    assert open_source(SourceConfig(path=str(tmp_path / "t.jsonl")))[4].key == "k0"
