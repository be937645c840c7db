"""The world that faults are planted into."""

from pathlib import Path

import pytest
from faults import World, copied
from tiny_data import make_all


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a fault; tests get copies."""
    return make_all(tmp_path_factory.mktemp("whole") / "w")


@pytest.fixture
def world(whole: Path, tmp_path: Path) -> World:
    return copied(whole, tmp_path / "w")
