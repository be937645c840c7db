import copy
import dataclasses
import gc
import logging
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_world import (
    TEACHER,
    DroppingServer,
    img2dataset_members,
    jpeg,
    serving,
    write_shards,
    write_tar,
)
from tiny_data import make_cache

from llm2clip_plugin.data import samples
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.eval_pairs import EvalPairs
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import SOURCE_BITS, PairDataset
from llm2clip_plugin.data.samples import (
    PREFETCH_MB,
    AugmentConfig,
    caption_hash,
    plan_loading,
    row_bytes,
)
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source
from llm2clip_plugin.errors import ContractError

IMAGES = ImageConfig(size=16)
AUGMENT = AugmentConfig(scale=(0.5, 1.0), flip=True, rotate=5)
EXACT = ("pixels", "embeddings", "caption_hashes", "image_ids")


def embedding_of(text: str) -> torch.Tensor:
    """A vector that only this text has, exact in float16."""
    return torch.tensor(
        [(caption_hash(text) >> shift) % 1024 / 512 - 1 for shift in (0, 10, 20, 30)]
    )


def embed(source: Source, folder: Path) -> EmbeddingCache:
    """A cache of ``source`` whose rows ``embedding_of`` knows."""
    return EmbeddingCache.open(
        make_cache(
            Path(source.path), embed=embedding_of, identity=TEACHER, directory=folder
        )
    )


@pytest.fixture
def dataset(tmp_path: Path) -> PairDataset:
    write_shards(tmp_path / "a", [7, 6])
    write_tar(tmp_path / "b" / "x.tar", img2dataset_members(100, 9))
    sources = [
        open_source(SourceConfig(path=str(tmp_path / name))) for name in ("a", "b")
    ]
    caches = [
        embed(source, tmp_path / f"cache{number}")
        for number, source in enumerate(sources)
    ]
    return PairDataset(sources, caches, IMAGES, AUGMENT, seed=3)


def batches(dataset: PairDataset, count: int, **settings: Any) -> list[dict[str, Any]]:
    return list(islice(PairLoader(dataset, **settings), count))


def rows(some_batches: list[dict[str, Any]]) -> Iterator[tuple]:
    """Each row of some batches, comparable."""
    for batch in some_batches:
        for number, key in enumerate(batch["keys"]):
            yield (
                key,
                batch["captions"][number],
                *(batch[name][number].numpy().tobytes() for name in EXACT),
            )


def test_a_batch_joins_image_caption_and_embedding(dataset: PairDataset) -> None:
    (batch,) = batches(dataset, 1, local_batch=22)
    assert batch["pixels"].shape == (22, 16, 16, 3)
    assert batch["pixels"].dtype == torch.uint8
    # an epoch: every image once
    assert batch["position"] == 22
    assert len(set(batch["image_ids"].tolist())) == 22
    for number, (key, text) in enumerate(
        zip(batch["keys"], batch["captions"], strict=True)
    ):
        assert str(int(key)) in text  # the caption is the image's own
        assert torch.equal(batch["embeddings"][number], embedding_of(text))
        assert batch["caption_hashes"][number] == caption_hash(text)
    kinds = {text.startswith("a longer") for text in batch["captions"]}
    assert kinds == {True, False}  # both kinds are drawn


def drawn(dataset: PairDataset, first: int, stop: int) -> list[tuple]:
    """Rows ``first`` .. ``stop``-1 of a run, one after the other: what every way of loading must
    give."""
    samples = [
        dataset[draw] for draw in dataset.mixture().batch_indices(first, stop - first)
    ]
    tensors = [
        (
            row.pixels,
            row.embeddings[0].numpy(),
            np.int64(caption_hash(row.captions[0].text)),
            np.int64(row.image_id),
        )
        for row in samples
        if row.embeddings is not None
    ]
    rows = []
    for row, values in zip(samples, tensors, strict=True):
        rows.append(
            (row.key, row.captions[0].text, *(value.tobytes() for value in values))
        )
    return rows


@pytest.mark.parametrize("micro_batch", [0, 3, 5])
def test_batches_depend_on_no_workers_parts_or_prefetch(
    dataset: PairDataset, micro_batch: int
) -> None:
    expected = drawn(dataset, 0, 48)
    for workers, prefetch_mb in ((0, 1), (1, 1), (2, 0.01)):
        settings = {
            "local_batch": 8,
            "micro_batch": micro_batch,
            "workers": workers,
            "prefetch_mb": prefetch_mb,
        }
        loaded = batches(dataset, 6, **settings)
        assert [batch["position"] for batch in loaded] == [8, 16, 24, 32, 40, 48]
        assert all(len(batch["keys"]) == len(batch["pixels"]) == 8 for batch in loaded)
        assert list(rows(loaded)) == expected


def test_every_global_batch_has_one_source_on_any_ranks_and_after_a_resume(
    dataset: PairDataset,
) -> None:
    dataset = copy.copy(dataset)
    dataset.one_source_batch = 8
    of_one_rank = batches(dataset, 8, local_batch=8)
    assert list(rows(of_one_rank)) == drawn(dataset, 0, 64)
    sources = set()
    for batch in of_one_rank:
        (source,) = {int(number) >> SOURCE_BITS for number in batch["image_ids"]}
        sources.add(source)
    assert len(sources) == 2
    two = [
        batches(dataset, 6, local_batch=4, position=16, rank=rank, world=2, workers=1)
        for rank in (0, 1)
    ]
    joined = [row for parts in zip(*two, strict=True) for row in rows(list(parts))]
    assert joined == list(rows(of_one_rank[2:]))


def test_sigterm_to_every_process_does_not_cost_a_batch(dataset: PairDataset) -> None:
    """A launcher or Slurm signals loader processes too; the run has to end its step, save, and stop
    them itself."""
    expected = [batch["keys"] for batch in batches(dataset, 20, local_batch=8)]
    others = set(multiprocessing.active_children())
    stream = iter(PairLoader(dataset, local_batch=8, workers=2))
    # one of each process: both have begun
    positions = [next(stream)["keys"] for _ in range(2)]
    loaders = set(multiprocessing.active_children()) - others
    assert len(loaders) == 2
    for process in loaders:
        process.terminate()
    # more than were prefetched
    positions += [batch["keys"] for batch in islice(stream, 18)]
    assert positions == expected
    del stream
    for process in loaders:
        process.join(timeout=60)
    assert not any(process.is_alive() for process in loaders)


def test_resume_at_any_position_and_any_number_of_ranks(dataset: PairDataset) -> None:
    undisturbed = list(rows(batches(dataset, 8, local_batch=12)))
    resumed = list(rows(batches(dataset, 5, local_batch=12, position=36)))
    assert resumed == undisturbed[36:]
    assert undisturbed == drawn(dataset, 0, 96)
    for world in (2, 3, 4):
        settings = {
            "local_batch": 12 // world,
            "micro_batch": 2,
            "position": 36,
            "world": world,
        }
        ranks = [batches(dataset, 5, rank=rank, **settings) for rank in range(world)]
        assert [batch["position"] for batch in ranks[0]] == [48, 60, 72, 84, 96]
        joined = [row for step in zip(*ranks, strict=True) for row in rows(list(step))]
        assert joined == undisturbed[36:]


def broken_source(tmp_path: Path, good: int) -> Source:
    """``good`` samples, and one each: cut JPEG, no image, empty caption."""
    broken = [
        ("cut.jpg", jpeg(0)[:-300]),
        ("cut.txt", b"its image is cut"),
        ("noimage.txt", b"text"),
    ]
    broken += [("mute.jpg", jpeg(0)), ("mute.txt", b"   ")]
    write_tar(tmp_path / "s" / "00000.tar", [*img2dataset_members(0, good), *broken])
    return open_source(SourceConfig(path=str(tmp_path / "s")))


def test_broken_samples_are_named_counted_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = broken_source(tmp_path, 17)
    dataset = PairDataset(
        [source], [embed(source, tmp_path / "cache")], IMAGES, AUGMENT, seed=1
    )
    loader = PairLoader(dataset, local_batch=20, max_broken=0.5)
    with caplog.at_level(logging.WARNING):
        loaded = list(islice(loader, 2))
    assert all(len(batch["keys"]) == 20 and "broken" not in batch for batch in loaded)
    assert not {"cut", "noimage", "mute"} & {
        key for batch in loaded for key in batch["keys"]
    }
    assert loader.rows == 40
    assert loader.substituted == 6
    reasons = {
        key: reason
        for (shard, key), reason in loader.broken.items()
        if shard == "00000"
    }
    assert reasons.keys() == {"cut", "noimage", "mute"}
    for key, says in {
        "cut": "cannot decode the image",
        "noimage": "no .jpg",
        "mute": "no caption",
    }.items():
        assert says in reasons[key]
    assert len(caplog.records) == 3  # once each
    assert "sample 'cut' of shard '00000'" in caplog.text
    again = batches(
        dataset, 2, local_batch=10, max_broken=0.5, rank=1, world=2, workers=2
    )
    expected = list(rows(loaded))
    # the same substitutes on other ranks and workers
    assert list(rows(again)) == expected[10:20] + expected[30:]


def test_a_caption_changed_after_embedding_stops(
    dataset: PairDataset, tmp_path: Path
) -> None:
    members = list(img2dataset_members(100, 9))
    write_tar(
        tmp_path / "b" / "x.tar",
        [(name, data.replace(b"104", b"777")) for name, data in members],
    )
    changed = open_source(SourceConfig(path=str(tmp_path / "b")))
    altered = PairDataset([dataset.sources[0], changed], dataset.caches, IMAGES, seed=3)
    with pytest.raises(ContractError, match="777"):
        batches(altered, 2, local_batch=22, workers=1)


def test_evaluation_has_every_image_once_with_all_captions(
    dataset: PairDataset,
) -> None:
    source = dataset.sources[0]
    cache = dataset.caches[0]
    loaded = list(EvalPairs(source, cache, IMAGES, batch=5))
    assert [len(batch["keys"]) for batch in loaded] == [5, 5, 3]
    assert torch.cat([batch["image_ids"] for batch in loaded]).tolist() == list(
        range(13)
    )
    owners = torch.cat([batch["owners"] for batch in loaded]).tolist()
    texts = [caption.text for batch in loaded for caption in batch["captions"]]
    assert owners == [number for number in range(13) for _ in range(2)]
    expected = torch.stack([embedding_of(text) for text in texts])
    assert torch.equal(torch.cat([batch["embeddings"] for batch in loaded]), expected)
    assert loaded[0]["meta"][2]["url"] == "https://host/2.jpg"
    ranks = [
        list(EvalPairs(source, cache, IMAGES, batch=5, rank=rank, world=3, workers=1))
        for rank in range(3)
    ]
    assert torch.equal(
        torch.cat([batch["pixels"] for rank in ranks for batch in rank]),
        torch.cat([batch["pixels"] for batch in loaded]),
    )


def test_evaluation_in_processes_has_the_same_bits_and_errors_and_leaves_none(
    tmp_path: Path,
) -> None:
    others = set(multiprocessing.active_children())
    source = broken_source(tmp_path, 40)
    cache = embed(source, tmp_path / "cache")
    alone, shared = (
        EvalPairs(source, cache, IMAGES, batch=41, workers=workers)
        for workers in (0, 2)
    )
    for batch, other_batch in zip(alone, shared, strict=True):
        for name, value in batch.items():
            same = (
                torch.equal(value, other_batch[name])
                if isinstance(value, torch.Tensor)
                else value == other_batch[name]
            )
            assert same, name
    assert [str(error) for error in shared.broken] == [
        str(error) for error in alone.broken
    ]
    assert alone.broken
    shutil.rmtree(tmp_path / "s")
    write_tar(tmp_path / "s/00000.tar", img2dataset_members(700, 40))  # other captions
    for workers in (0, 2):
        with pytest.raises(ContractError, match="00000"):
            list(
                EvalPairs(
                    open_source(source.config), cache, IMAGES, batch=41, workers=workers
                )
            )
    gc.collect()  # pytest's record of the error holds the loader
    assert set(multiprocessing.active_children()) <= others


def test_a_part_without_a_readable_image_leaves_the_others_their_shapes(
    tmp_path: Path,
) -> None:
    source = broken_source(tmp_path, 16)
    images = ImageConfig(size=16, fit="native", patch=4)
    for indices in ([16] * 16 + [*range(16)], [*range(16)] + [16] * 16):
        (batch,) = EvalPairs(source, None, images, batch=32, indices=indices, workers=2)
        assert batch["spatial_shapes"].shape == (16, 2)


WAIT = 120  # seconds that a few kB may take on a busy machine


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_window_is_downloaded_while_one_is_read(
    tmp_path: Path, workers: int
) -> None:
    files = {
        f"/{path.name}": path.read_bytes()
        for path in write_shards(tmp_path / "data", [8] * 4).glob("*.tar")
    }
    with serving(DroppingServer(files)) as address:
        config = SourceConfig(
            path=f"{address}/{{00000..00003}}.tar",
            cache_folder=str(tmp_path / "cache"),
            shuffle_window=1,
        )
        source = open_source(config)
        copies = [
            config.downloads.local_path(f"{address}/{shard.name}.tar")
            for shard in source.shards
        ]
        for copy in copies:
            copy.unlink()  # the indexes stay
        dataset = PairDataset([source], [None], ImageConfig(size=8), seed=0)
        order = [
            dataset.mixture().window_shards(0, 8 * window, 0, 1, 8)[0][0]
            for window in range(4)
        ]
        stream = iter(
            PairLoader(dataset, local_batch=1, workers=workers, prefetch_mb=0.001)
        )
        keys = [next(stream)["keys"][0]]
        wait_for(lambda: copies[order[0]].exists() and copies[order[1]].exists())
        assert not copies[order[3]].exists()  # two windows later: nobody reads it yet
        keys += [batch["keys"][0] for batch in islice(stream, 31)]
        assert sorted(keys) == [f"{number:09d}" for number in range(32)]


L14_336 = row_bytes(336, 4096)  # a row of openai_l14_336 against Llama 3's embeddings


@pytest.mark.parametrize("rows", [1, 16, 512, 4096])
@pytest.mark.parametrize("micro_batch", [1, 16, 512])
@pytest.mark.parametrize("workers", [1, 8, 32])
def test_what_is_prepared_ahead_is_bounded(
    rows: int, micro_batch: int, workers: int
) -> None:
    micro_batch = min(rows, micro_batch)
    plan = plan_loading(
        rows=rows,
        micro_batch=micro_batch,
        workers=workers,
        row_bytes=L14_336,
        prefetch_mb=PREFETCH_MB,
    )
    assert 1 <= plan.part <= micro_batch
    assert plan.prefetch >= 1
    assert plan.shared_bytes <= PREFETCH_MB * 1e6
    more_than_enough = (
        plan.part * plan.workers * max(2, 1 + 2 * rows // (plan.part * workers))
    )
    assert plan.part * plan.workers * plan.prefetch <= more_than_enough


def test_too_little_shared_memory_is_told(tmp_path: Path) -> None:
    plan = plan_loading(
        rows=512, micro_batch=512, workers=8, row_bytes=L14_336, prefetch_mb=PREFETCH_MB
    )
    free = shutil.disk_usage(tmp_path).free
    fits = 1
    too_many = free // plan.shared_bytes + 2
    assert not samples.lacks_shared_memory([plan], fits, str(tmp_path))
    assert f"need {too_many * plan.shared_bytes:,}" in samples.lacks_shared_memory(
        [plan], too_many, str(tmp_path)
    )
    none = dataclasses.replace(plan, workers=0)
    assert not samples.lacks_shared_memory([none], too_many, str(tmp_path))
    # not Linux
    assert not samples.lacks_shared_memory([plan], too_many, str(tmp_path / "absent"))
