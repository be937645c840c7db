import os
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from data_world import DroppingServer, serving, write_shards

from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import make_loader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.sources import tars as webdataset
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source

WAIT = 120  # seconds that a few kB may take on a busy machine


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_window_is_downloaded_while_one_is_read(tmp_path: Path, workers: int) -> None:
    files = {f"/{path.name}": path.read_bytes() for path in write_shards(tmp_path / "data", [8] * 4).glob("*.tar")}
    with serving(DroppingServer(files)) as address:
        config = SourceConfig(
            path=f"{address}/{{00000..00003}}.tar", cache_folder=str(tmp_path / "cache"), shuffle_window=1
        )
        source = open_source(config)
        copies = [config.downloads.local_path(f"{address}/{shard.name}.tar") for shard in source.shards]
        for copy in copies:
            copy.unlink()  # the indexes stay
        dataset = PairDataset([source], [None], ImageConfig(size=8), seed=0)
        order = [dataset.mixture().window_shards(0, 0, window)[0] for window in range(4)]
        stream = iter(make_loader(dataset, local_batch=1, workers=workers, prefetch_mb=0.001))
        keys = [next(stream)["keys"][0]]
        wait_for(lambda: copies[order[0]].exists() and copies[order[1]].exists())
        assert not copies[order[3]].exists()  # two windows later: nobody reads it yet
        keys += [batch["keys"][0] for batch in islice(stream, 31)]
        assert sorted(keys) == [f"{number:09d}" for number in range(32)]


def network_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PairDataset, set[str]]:
    """Four shards on a network file system in windows of one, and the names of the tars that were read at once."""
    source = open_source(SourceConfig(path=str(write_shards(folder, [8] * 4)), shuffle_window=1))
    monkeypatch.setattr(webdataset, "is_network", lambda path: True)
    read, pread = set(), os.pread

    def noted(descriptor: int, size: int, offset: int) -> bytes:
        if size == webdataset.PIECE:
            read.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).stem)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", noted)
    return PairDataset([source], [None], ImageConfig(size=8), seed=0), read


@pytest.mark.parametrize("whole", [True, False])
def test_the_next_window_of_a_network_disk_is_read_by_a_machine_that_needs_all_of_it(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, read = network_set(tmp_path, monkeypatch)
    order = [dataset.sources[0].shards[dataset.mixture().window_shards(0, 0, number)[0]].name for number in range(4)]
    stream = iter(make_loader(dataset, local_batch=4, whole_shards=whole))
    next(stream)
    if whole:
        wait_for(lambda: read == {order[1]})
    list(islice(stream, 7))
    if whole:
        wait_for(lambda: read >= set(order[1:]))
    else:
        assert not read
