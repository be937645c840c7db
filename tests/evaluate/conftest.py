"""The small world, made once."""

import pytest
from evaluate_world import write_cache, write_data, write_tower

from llm2clip_plugin.data.sources import SourceConfig, open_source


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """(data, cache, tower directory), all on disk."""
    folder = tmp_path_factory.mktemp("world")
    data = write_data(folder / "data")
    cache = write_cache(open_source(SourceConfig(path=str(data))), folder / "cache")
    return data, cache, write_tower(folder / "tower")
