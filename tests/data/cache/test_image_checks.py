"""What a cache knows of the images whose captions were embedded: exchanged, changed and lost ones are told."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from data_world import TEACHER, img2dataset_members, jpeg, write_shards, write_tar
from torch.utils.data import DataLoader, Dataset

from llm2clip_plugin.data.cache import CacheWriter, EmbeddingCache, caption_rows, rows_digest, shard_contents
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import make_loader
from llm2clip_plugin.data.pairs import CollatedDataset, PairDataset, as_it_is, eval_pairs, raised
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.files import ContractError

WIDTH = TEACHER.width
IMAGES = ImageConfig(size=16)
SAMPLES = 6
LOST = f"{SAMPLES - 1}.jpg"  # an image that is not there when the captions are embedded


def embed(source: Source, folder: Path) -> EmbeddingCache:
    """A cache of ``source`` and of its images, as ``llm2clip embed`` writes it."""
    writer = CacheWriter(folder, TEACHER)
    for shard in source.shards:
        keys, captions, checks = shard_contents(source, shard)
        rows = caption_rows(captions)
        writer.write_shard(shard.name, keys, rows, torch.ones(len(rows), WIDTH), image_checks=checks)
    writer.finish()
    return EmbeddingCache.open(folder)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A .jsonl file with images next to it, of which one is missing."""
    folder = tmp_path / "table"
    folder.mkdir()
    for number in range(SAMPLES):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    (folder / LOST).unlink()
    lines = [{"id": f"k{n}", "image": f"{n}.jpg", "caption": f"picture {n}"} for n in range(SAMPLES)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "pairs.jsonl"


def open_table(table: Path, **options: str) -> Source:
    return open_source(SourceConfig(path=str(table), **options))


def exchange(table: Path, *numbers: int) -> None:
    first, second = (table.with_name(f"{number}.jpg") for number in numbers)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def broken_in_training(source: Source, cache: EmbeddingCache) -> dict[str, str]:
    """Keys and reasons of the samples that training replaces in two epochs."""
    dataset = PairDataset([source], [cache], IMAGES, seed=0)
    loader = make_loader(dataset, local_batch=len(source), max_broken=1.0)
    for _ in zip(range(2), loader, strict=False):
        pass
    return {key: reason for (_, key), reason in loader.broken.items()}


def test_images_that_are_the_same_are_no_matter(table: Path, tmp_path: Path) -> None:
    """Nor is one that was missing before and is missing now."""
    source = open_table(table)
    cache = embed(source, tmp_path / "cache")
    assert broken_in_training(source, cache).keys() == {"k5"}
    cache.check(source, full=True)
    cache.verify()
    os.utime(table.with_name("0.jpg"))
    cache.check(source, full=True)


def test_exchanged_images_are_replaced_and_named(table: Path, tmp_path: Path) -> None:
    cache = embed(open_table(table), tmp_path / "cache")
    exchange(table, 1, 3)
    source = open_table(table)
    cache.check(source)  # the captions are the same, and images are not read for a start
    broken = broken_in_training(source, cache)
    assert broken.keys() == {"k1", "k3", "k5"}
    assert "was changed or exchanged after its captions were embedded" in broken["k1"]
    assert "pairs.safetensors and rerun `llm2clip embed`" in broken["k3"]
    pairs = eval_pairs(source, cache, IMAGES, batch=4)
    assert [key for batch in pairs for key in batch["keys"]] == ["k0", "k2", "k4"]
    assert [error.key for error in pairs.broken] == ["k1", "k3", "k5"]
    with pytest.raises(ContractError, match=r"2 images of shard 'pairs' were changed .*: 'k1', 'k3'"):
        cache.check(source, full=True)
    exchange(table, 1, 3)
    cache.check(source, full=True)


def test_images_exchanged_in_a_tar(tmp_path: Path) -> None:
    """A tar that is written again is indexed and its captions are compared again; the images are then told, too."""
    write_shards(tmp_path / "data", [5])
    cache = embed(open_source(SourceConfig(path=str(tmp_path / "data"))), tmp_path / "cache")
    members = list(img2dataset_members(0, 5))
    swapped = {members[0][0]: members[3][1], members[3][0]: members[0][1]}
    write_tar(tmp_path / "data" / "00000.tar", [(name, swapped.get(name, data)) for name, data in members])
    source = open_source(SourceConfig(path=str(tmp_path / "data")))
    cache.check(source)
    assert broken_in_training(source, cache).keys() == {"000000000", "000000001"}
    with pytest.raises(ContractError, match="2 images of shard '00000'"):
        cache.check(source, full=True)


def test_embedding_again_accepts_new_images(table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_table(table)
    embed(source, tmp_path / "cache")
    writer = CacheWriter(tmp_path / "cache", TEACHER)

    def complete() -> bool:
        keys, captions, checks = shard_contents(source, source.shards[0])
        return writer.is_complete("pairs", rows_digest(keys, caption_rows(captions)), checks)

    with caplog.at_level(logging.WARNING):
        assert complete() and not caplog.text
        table.with_name(LOST).write_bytes(jpeg(99))  # it was missing
        assert not complete()
    assert "pairs.safetensors: 1 images have changed (k5)" in caplog.text
    cache = embed(source, tmp_path / "cache")
    assert complete() and not broken_in_training(source, cache)


def test_images_at_a_url_are_not_read_for_it(table: Path) -> None:
    source = open_table(table, images="http://127.0.0.1:9/images")
    assert shard_contents(source, source.shards[0])[2] is None


def test_a_shard_that_was_removed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a folder: a pattern may stand for a part of what was embedded."""
    write_shards(tmp_path / "data", [2, 2, 2])
    cache = embed(open_source(SourceConfig(path=str(tmp_path / "data"))), tmp_path / "cache")
    (tmp_path / "data" / "00001.tar").unlink()
    cache.check(open_source(SourceConfig(path=str(tmp_path / "data" / "{00000,00002}.tar"))))
    assert "warning" not in capsys.readouterr().err
    cache.check(open_source(SourceConfig(path=str(tmp_path / "data"))))
    assert f"warning: {tmp_path}/data has 2 shards, 3 were embedded; not there: 00001" in capsys.readouterr().err


class Damaged(Dataset):
    """Two samples, of which the second is not readable."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> int:
        if number:
            raise ContractError("a file is damaged")
        return number


def test_a_loader_process_hands_over_its_error() -> None:
    """The message without the traceback of that process."""
    loader = DataLoader(CollatedDataset(Damaged(), list), 2, collate_fn=as_it_is, num_workers=1)
    with pytest.raises(ContractError, match=r"^a file is damaged$"):
        list(raised(loader))
