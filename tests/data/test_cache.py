"""The embedding cache keeps what was put in, and refuses everything that is not what the reader
expects."""

import dataclasses
import json
from pathlib import Path

import data_world
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from llm2clip_plugin.contracts import TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.cache_file import caption_rows, rows_digest, shard_captions
from llm2clip_plugin.data.cache_writer import CacheWriter
from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.errors import ContractError

WIDTH = 640
TEACHER = dataclasses.replace(data_world.TEACHER, width=WIDTH)
CAPTIONS = [
    ["a red bike", "a red bike leans on a wall"],
    ["猫"],
    ["two dogs"],
    ["a boat", "un bateau", "ein Boot"],
]


def write_jsonl(
    folder: Path, captions: list[list[str]], name: str = "pairs", prefix: str = "k"
) -> SourceConfig:
    """A JSON Lines source with ``captions`` (the images are never read here)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": f"{prefix}{i}", "image": f"{i}.png", "captions": texts})
        for i, texts in enumerate(captions)
    ]
    (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return SourceConfig(path=str(folder / f"{name}.jsonl"))


def fill(
    directory: Path, source, dtype: str = "float16", teacher: TeacherIdentity = TEACHER
) -> torch.Tensor:
    """Write random embeddings of ``source`` whole; returns them in the order of its captions."""
    writer = CacheWriter(directory, teacher, dtype)
    keys, captions = shard_captions(source, source.shards[0])
    rows = caption_rows(captions)
    embeddings = torch.randn(
        len(rows), teacher.width, generator=torch.Generator().manual_seed(0)
    )
    writer.write_shard(source.shards[0].name, keys, rows, embeddings)
    assert writer.finish() is not None
    return embeddings


@pytest.fixture
def source(tmp_path: Path):
    return open_source(write_jsonl(tmp_path / "data", CAPTIONS))


@pytest.mark.parametrize(("dtype", "cosine"), [("float16", 0.999999), ("int8", 0.999)])
def test_round_trip_by_caption_in_any_order(
    source, tmp_path: Path, dtype: str, cosine: float
) -> None:
    written = fill(tmp_path / "cache", source, dtype)
    cache = EmbeddingCache.open(
        tmp_path / "cache", expect_fingerprint=TEACHER.fingerprint, expect_width=WIDTH
    )
    cache.check(source)
    cache.verify()
    assert cache.width == WIDTH
    assert cache.teacher == TEACHER
    assert cache.manifest.captions == 7
    first = 0
    for number in range(len(source)):
        key, captions = source.captions(number)
        rows = cache.rows(*source.locate(number), captions[::-1], key=key).flip(0)
        expected = written[first : first + len(captions)]
        assert rows.dtype == torch.float32
        assert rows.shape == expected.shape
        assert torch.nn.functional.cosine_similarity(rows, expected).min() > cosine
        first += len(captions)


def test_int8_refuses_rows_that_one_dimension_fills(tmp_path: Path) -> None:
    """Fifty dimensions of 12 beside one of 1,000: rounded in steps of 8, most of them are off by a
    third."""
    writer = CacheWriter(tmp_path, dataclasses.replace(TEACHER, width=4096), "int8")
    row = torch.full((1, 4096), 3.9)
    row[0, 0] = 1000.0
    with pytest.raises(
        ContractError, match=r"its int8 form is 0\.9\d+, .* --dtype float16"
    ):
        writer.write_shard("s", ["k"], [(0, 0)], row)


def test_float16_holds_rows_beyond_its_range(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, dataclasses.replace(TEACHER, width=4))
    rows = torch.tensor([[3e5, -1.0, 2e4, 7.0], [0.5, 0.25, -0.125, 0.0]])
    writer.write_shard("s", ["k"], [(0, 0), (0, 1)], rows)
    writer.finish()
    read = EmbeddingCache.open(tmp_path).shard("s").embeddings(range(2))
    assert torch.allclose(read, rows, rtol=1e-3)
    assert torch.isfinite(read).all()


def test_equal_captions_share_a_row_and_blank_ones_have_none() -> None:
    rows = caption_rows(
        [[Caption("a"), Caption("a", kind="long"), Caption(" ")], [], [Caption("a")]]
    )
    assert [index for index, _ in rows] == [0, 2]


def test_another_teacher_dtype_or_width_is_refused(source, tmp_path: Path) -> None:
    fill(tmp_path / "cache", source)
    other = dataclasses.replace(TEACHER, weights_sha256="b" * 64)
    with pytest.raises(ContractError) as caught:
        EmbeddingCache.open(tmp_path / "cache", expect_fingerprint=other.fingerprint)
    assert other.fingerprint in str(caught.value)
    assert TEACHER.fingerprint in str(caught.value)
    with pytest.raises(ContractError, match=r"width 640 .* expected 4096"):
        EmbeddingCache.open(tmp_path / "cache", expect_width=4096)
    with pytest.raises(ContractError, match=r"pooling 'mean' != 'last'"):
        CacheWriter(tmp_path / "cache", dataclasses.replace(TEACHER, pooling="last"))
    with pytest.raises(ContractError, match=r"float16, not int8"):
        CacheWriter(tmp_path / "cache", TEACHER, "int8")
    # the same weights
    moved = dataclasses.replace(TEACHER, llm="/elsewhere/tiny", revision="main")
    EmbeddingCache.open(tmp_path / "cache", expect_fingerprint=moved.fingerprint)
    CacheWriter(tmp_path / "cache", moved)


def test_changed_captions_keys_and_counts_are_refused_with_both_values(
    source, tmp_path: Path
) -> None:
    fill(tmp_path / "cache", source)
    cache = EmbeddingCache.open(tmp_path / "cache")
    changed = open_source(
        write_jsonl(tmp_path / "changed", [*CAPTIONS[:2], ["three dogs"], CAPTIONS[3]])
    )
    for read in (
        lambda: cache.check(changed),
        lambda: cache.rows("pairs", 2, changed.captions(2)[1]),
    ):
        with pytest.raises(
            ContractError,
            match=r"'k2': caption 'three dogs' \(hash \w{16}\) .* hashes: \w{16}",
        ):
            read()
    renamed = open_source(write_jsonl(tmp_path / "renamed", CAPTIONS, prefix="image"))
    for read in (
        lambda: cache.check(renamed),
        lambda: cache.rows("pairs", 0, renamed.captions(0)[1], key="image0"),
    ):
        with pytest.raises(
            ContractError, match="key 'image0' in the data, 'k0' in the cache"
        ):
            read()
    longer = open_source(write_jsonl(tmp_path / "longer", [*CAPTIONS, ["one more"]]))
    with pytest.raises(
        ContractError, match=r"has 5 samples in .*, 4 when it was embedded"
    ):
        cache.check(longer)
    unknown = open_source(write_jsonl(tmp_path / "unknown", CAPTIONS, name="train"))
    with pytest.raises(ContractError, match="no shard 'train'; known: pairs"):
        cache.check(unknown)


def test_files_are_compared_by_size_and_when_they_are_read(
    source, tmp_path: Path
) -> None:
    fill(tmp_path / "cache", source)
    fill(
        tmp_path / "other", source, teacher=dataclasses.replace(TEACHER, pooling="last")
    )
    file = tmp_path / "cache" / "pairs.safetensors"
    whole = (tmp_path / "other" / "pairs.safetensors").read_bytes()
    file.write_bytes(whole)
    with pytest.raises(ContractError, match="differs from the manifest: fingerprint"):
        EmbeddingCache.open(tmp_path / "cache").rows("pairs", 0, source.captions(0)[1])
    file.write_bytes(whole[:-1])
    with pytest.raises(ContractError, match=r"pairs\.safetensors has \d+ bytes"):
        EmbeddingCache.open(tmp_path / "cache")


def test_writer_refuses_bad_rows(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, TEACHER)
    with pytest.raises(ValueError, match="a caption of 'k' is not finite"):
        writer.write_shard("s", ["k"], [(0, 0)], torch.full((1, WIDTH), np.inf))
    with pytest.raises(ValueError, match="in order of sample"):
        writer.write_shard("s", ["k", "l"], [(1, 0), (0, 1)], torch.zeros(2, WIDTH))
    assert not (tmp_path / "s.safetensors").exists()


def damage(path: Path, tensor: str, position: int) -> None:
    """Change one byte of a tensor in a shard's file."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    at = (
        8
        + length
        + json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]
        + position
    )
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("tensor", ["embeddings", "scales", "row_checks"])
def test_a_flipped_byte_is_found_when_its_row_is_read(
    source, tmp_path: Path, tensor: str
) -> None:
    """The other rows are read; embedding again finds the shard damaged and writes it again."""
    fill(tmp_path / "cache", source)
    file = tmp_path / "cache" / "pairs.safetensors"
    cache = EmbeddingCache.open(tmp_path / "cache")
    whole = cache.shard("pairs").embeddings(range(7))
    damage(file, tensor, 0)
    cache = EmbeddingCache.open(tmp_path / "cache")
    cache.check(source)
    with pytest.raises(ContractError, match=r"pairs\.safetensors is damaged: row 0"):
        cache.rows("pairs", 0, source.captions(0)[1])
    assert torch.equal(cache.shard("pairs").embeddings(range(1, 7)), whole[1:])
    with pytest.raises(ContractError, match="is damaged: SHA-256"):
        cache.verify()


def test_exchanged_rows_are_found_when_they_are_read(source, tmp_path: Path) -> None:
    """Each row still has its own checksum, which also covers the row's number."""
    fill(tmp_path / "cache", source)
    path = tmp_path / "cache" / "pairs.safetensors"
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name in ("embeddings", "scales", "row_checks"):
        tensors[name] = tensors[name].copy()
        tensors[name][[0, 1]] = tensors[name][[1, 0]]
    save_file(tensors, path, metadata=metadata)
    cache = EmbeddingCache.open(tmp_path / "cache")
    for row in (0, 1):
        with pytest.raises(
            ContractError, match=rf"pairs\.safetensors is damaged: row {row}"
        ):
            cache.shard("pairs").embeddings([row])
    cache.shard("pairs").embeddings([2])


@pytest.mark.parametrize(
    "tensor",
    ["embeddings", "scales", "row_checks", "caption_hashes", "keys", "row_starts"],
)
def test_a_damaged_shard_is_not_complete(
    source, tmp_path: Path, caplog: pytest.LogCaptureFixture, tensor: str
) -> None:
    fill(tmp_path / "cache", source)
    keys, captions = shard_captions(source, source.shards[0])
    digest = rows_digest(keys, caption_rows(captions))
    writer = CacheWriter(tmp_path / "cache", TEACHER)
    assert writer.is_complete("pairs", digest)
    assert not caplog.text
    damage(tmp_path / "cache" / "pairs.safetensors", tensor, 0)
    assert not writer.is_complete("pairs", digest)
    assert "is damaged: SHA-256" in caplog.text
