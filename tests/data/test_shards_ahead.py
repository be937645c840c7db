import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from data_world import DroppingServer, serving, write_shards

from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.sources import SourceConfig, open_source

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
        stream = iter(PairLoader(dataset, local_batch=1, workers=workers, prefetch_mb=0.001))
        keys = [next(stream)["keys"][0]]
        wait_for(lambda: copies[order[0]].exists() and copies[order[1]].exists())
        assert not copies[order[3]].exists()  # two windows later: nobody reads it yet
        keys += [batch["keys"][0] for batch in islice(stream, 31)]
        assert sorted(keys) == [f"{number:09d}" for number in range(32)]
