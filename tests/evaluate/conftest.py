"""The small world, made once."""

import pytest
from evaluate_world import write_data, write_tower
from tiny_data import make_cache


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """(data, cache, tower directory), all on disk."""
    folder = tmp_path_factory.mktemp("world")
    data = write_data(folder / "data")
    cache = make_cache(data, directory=folder / "cache")
    return data, cache, write_tower(folder / "tower")
