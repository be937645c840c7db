"""The import command: round trips, other resolutions, preprocessing, timm by name."""

import json
import shutil

import pytest

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.vision.convert import importing as command
from llm2clip_plugin.vision.convert.importing import import_tower

from .checkpoints import RELEASE, SOURCES


@pytest.mark.parametrize("name", SOURCES)
def test_import_export_import_is_identical(name, tmp_path):
    from llm2clip_plugin.stages.export import main as export_main

    source, config = SOURCES[name]
    import_tower(source, tmp_path / "one", config=config)
    assert export_main([str(tmp_path / "one"), "--output", str(tmp_path / "two")]) == 0
    assert command.main([str(tmp_path / "two"), "--output", str(tmp_path / "three")]) == 0
    first = TowerCard.read(tmp_path / "one" / "llm2clip.json")
    for again in ("two", "three"):
        assert TowerCard.read(tmp_path / again / "llm2clip.json") == first
        one, other = (tmp_path / folder / "model.safetensors" for folder in ("one", again))
        assert other.read_bytes() == one.read_bytes()


def test_preprocessor_of_the_source_survives(tmp_path):
    shutil.copytree(RELEASE, tmp_path / "release")
    own = {
        "image_mean": [0.4, 0.5, 0.6],
        "resample": 2,
        "size": {"shortest_edge": 30},
        "crop_size": 30,
    }
    (tmp_path / "release" / "preprocessor_config.json").write_text(json.dumps(own))
    import_tower(tmp_path / "release", tmp_path / "tower")
    written = json.loads((tmp_path / "tower" / "preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.4, 0.5, 0.6]
    assert written["resample"] == 2
    assert written["size"] == {"shortest_edge": 28}
