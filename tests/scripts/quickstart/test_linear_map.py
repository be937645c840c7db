"""The control "map": a linear map on the frozen LLM's embeddings, fitted to stage 1's captions."""

import dataclasses
from pathlib import Path

import inputs
import linear_map
import measure
import pytest
import torch
import torch.nn.functional as F
from linear_map import Concept, MapConfig
from quickstart_folders import IDENTITY, WIDTH, write_cache

from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.errors import ContractError


def make_concepts(count: int, seed: int) -> list[Concept]:
    """Concepts whose captions agree in six of 16 directions, nearly, and differ in the others."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(
        torch.randn(16, 16, generator=torch.Generator().manual_seed(9))
    )[0]
    concepts = []
    for number in range(count):
        meaning = torch.randn(6, generator=generator)
        rows = {}
        for kind in linear_map.KINDS:
            slip = 0.3 * torch.randn(6, generator=generator)
            noise = 3 * torch.randn(10, generator=generator)
            rows[kind] = torch.cat([meaning + slip, noise]) @ rotation + 5
        concepts.append(Concept(family=str(number), rows=rows))
    return concepts


def top_1(concepts: list[Concept], change) -> float:
    """How often the keywords nearest to a name are its own."""
    name_NW = F.normalize(
        change(torch.stack([c.rows["short"] for c in concepts])), dim=1
    )
    keywords_NW = F.normalize(
        change(torch.stack([c.rows["keywords"] for c in concepts])), dim=1
    )
    nearest_N = (name_NW @ keywords_NW.T).argmax(dim=1)
    return float((nearest_N == torch.arange(len(concepts))).float().mean())


def test_whitened_captions_of_one_concept_differ_alike_in_all_directions() -> None:
    concepts = make_concepts(40, seed=0)
    whitening = linear_map.whiten_within(concepts, 0.0)
    rows_NKW = torch.stack(
        [whitening(torch.stack(list(c.rows.values()))) for c in concepts]
    )
    assert rows_NKW.mean(dim=(0, 1)).abs().max() < 1e-4
    differences_CW = (rows_NKW - rows_NKW.mean(dim=1, keepdim=True)).flatten(0, 1)
    covariance_WW = differences_CW.T @ differences_CW / (3 * 40 - 40)
    assert torch.allclose(covariance_WW, torch.eye(16), atol=1e-3)
    # shrunk all the way, it is the identity but for its scale
    weight_WW = linear_map.whiten_within(concepts, 1.0).weight
    assert torch.allclose(weight_WW, weight_WW[0, 0] * torch.eye(16), atol=1e-4)
    alone = [Concept("0", {"short": torch.ones(4)})]
    with pytest.raises(ValueError, match="no concept has two captions"):
        linear_map.whiten_within(alone, 0.5)


def test_a_fitted_map_finds_captions_of_concepts_that_it_never_saw() -> None:
    seen = make_concepts(80, seed=0)
    unseen = make_concepts(80, seed=1)
    config = MapConfig(learning_rate=1e-2, shrinkage=0.1, steps=100)
    whitening = linear_map.whiten_within(seen, config.shrinkage)
    fitted = linear_map.fit_map(seen, config, seed=0)
    reached = [
        top_1(unseen, change) for change in (lambda rows: rows - 5, whitening, fitted)
    ]
    assert reached == sorted(reached), reached
    assert reached[0] + 0.2 < reached[1], reached
    assert torch.equal(fitted.weight, linear_map.fit_map(seen, config, seed=0).weight)
    assert not torch.equal(
        fitted.weight, linear_map.fit_map(seen, config, seed=1).weight
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """data/, the raw LLM's cache of it, and those of a training and of a test shard with
    keywords."""
    folder = tmp_path_factory.mktemp("linear-map")
    inputs.prepare(folder / "data", (3, 3, 3), ("de",))
    write_cache(folder / "data" / "all", folder / "data" / "cache" / "raw")
    for split in ("train", "test"):
        shard = folder / split / f"{split}-noto.tar"
        shard.parent.mkdir()
        inputs.write_tar(shard, inputs.read_tar(inputs.EMOJI / shard.name)[:12])
        write_cache(shard, folder / "captions" / split)
    return folder


def write_map(folder: Path, split: str, output: Path, seed: int = 0) -> EmbeddingCache:
    """The cache of a map that is fitted to the captions of ``split``."""
    linear_map.write_map(
        folder / "data" / "all",
        cache=folder / "data" / "cache" / "raw",
        captions=folder / "captions" / split,
        shard=folder / split / f"{split}-noto.tar",
        output=output,
        seed=seed,
    )
    return EmbeddingCache.open(output)


def test_a_map_is_a_teacher_of_its_own(folder, tmp_path) -> None:
    mapped = write_map(folder, "train", tmp_path / "map-seed0")
    raw = EmbeddingCache.open(folder / "data" / "cache" / "raw")
    measure.check_cache(folder / "data", "map-seed0", mapped)
    for name in ("raw", "random", "map-seed1"):
        with pytest.raises(ContractError, match=r"embedded with .*'map': True"):
            measure.check_cache(folder / "data", name, mapped)
    with pytest.raises(ContractError, match=r"embedded with .*'map': False"):
        measure.check_cache(folder / "data", "map-seed0", raw)
    assert mapped.manifest.teacher["llm"] == linear_map.MAP
    again = write_map(folder, "train", tmp_path / "map-seed1", seed=1)
    assert len({raw.fingerprint, mapped.fingerprint, again.fingerprint}) == 3
    caches = {"map-seed0": mapped, "map-seed1": again}
    tower = Path("towers/map-seed1")
    assert measure.cache_of(tower, again.manifest.teacher, caches) is again
    with pytest.raises(ContractError, match="expected that of map-seed1"):
        measure.cache_of(tower, mapped.manifest.teacher, caches)
    (tmp_path / "map-seed0" / linear_map.RECORD).write_bytes(
        (tmp_path / "map-seed1" / linear_map.RECORD).read_bytes()
    )
    with pytest.raises(ContractError, match="is of the map"):
        measure.check_cache(folder / "data", "map-seed0", mapped)


def test_a_mapped_embedding_is_the_map_of_the_raw_one(folder, tmp_path) -> None:
    mapped = write_map(folder, "train", tmp_path / "map-seed0")
    raw = EmbeddingCache.open(folder / "data" / "cache" / "raw")
    captions = EmbeddingCache.open(folder / "captions" / "train")
    shard = folder / "train" / "train-noto.tar"
    concepts = linear_map.read_concepts(shard, captions)
    assert len(concepts) == 12
    assert {*concepts[0].rows} == {*linear_map.KINDS}
    linear = linear_map.fit_map(concepts, MapConfig(), seed=0)
    source = open_source(SourceConfig(path=str(folder / "data" / "all")))
    for number in range(len(source)):
        sample = source[number]
        at = source.locate(number)
        expected = linear(raw.rows(*at, sample.captions, key=sample.key))
        rows = mapped.rows(*at, sample.captions, key=sample.key)
        assert rows.shape[1] == WIDTH
        assert torch.allclose(rows, expected, atol=0.02, rtol=0.01)


def test_a_map_of_test_captions_is_refused(folder, tmp_path) -> None:
    mapped = write_map(folder, "test", tmp_path / "map-seed0")
    with pytest.raises(
        ContractError, match=r"'trained on': \['test-noto.tar'\].*'train-noto"
    ):
        measure.check_cache(folder / "data", "map-seed0", mapped)


def test_captions_read_in_another_way_are_refused(folder, tmp_path) -> None:
    other = dataclasses.replace(IDENTITY, layer=7)
    shard = folder / "train" / "train-noto.tar"
    write_cache(shard, tmp_path / "captions", other)
    with pytest.raises(ContractError, match="expected"):
        linear_map.write_map(
            folder / "data" / "all",
            cache=folder / "data" / "cache" / "raw",
            captions=tmp_path / "captions",
            shard=shard,
            output=tmp_path / "map-seed0",
            seed=0,
        )
    assert not (tmp_path / "map-seed0").exists()
