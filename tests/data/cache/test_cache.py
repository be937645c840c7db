"""The embedding cache keeps what was put in, and refuses everything that is not what the reader expects."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llm2clip_plugin.contracts import CacheManifest, EmbedRecord, TeacherIdentity, shard_file
from llm2clip_plugin.data.cache import CacheWriter, EmbeddingCache, caption_rows, rows_digest
from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.files import ContractError, started_by

WIDTH = 640
TEACHER = TeacherIdentity(
    llm="models/tiny",
    revision="",
    weights_sha256="a" * 64,
    adapter_sha256="",
    attention="bidirectional",
    pooling="mean",
    layer=-1,
    prompt="",
    chat_template="",
    max_tokens=512,
    width=WIDTH,
)
CAPTIONS = [["a red bike", "a red bike leans on a wall"], ["猫"], ["two dogs"], ["a boat", "un bateau", "ein Boot"]]


def write_jsonl(folder: Path, captions: list[list[str]], name: str = "pairs", prefix: str = "k") -> SourceConfig:
    """A JSON Lines source with ``captions`` (the images are never read here)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": f"{prefix}{i}", "image": f"{i}.png", "captions": texts}) for i, texts in enumerate(captions)
    ]
    (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return SourceConfig(path=str(folder / f"{name}.jsonl"))


def captions_of(source) -> tuple[list[str], list[tuple[Caption, ...]]]:
    pairs = [source.captions(i) for i in range(len(source))]
    return [key for key, _ in pairs], [found for _, found in pairs]


def fill(directory: Path, source, dtype: str = "float16", teacher: TeacherIdentity = TEACHER) -> torch.Tensor:
    """Write random embeddings of ``source`` whole; returns them in the order of its captions."""
    writer = CacheWriter(directory, teacher, dtype)
    keys, captions = captions_of(source)
    rows = caption_rows(captions)
    embeddings = torch.randn(len(rows), teacher.width, generator=torch.Generator().manual_seed(0))
    writer.write_shard(source.shards[0].name, keys, rows, embeddings)
    assert writer.finish() is not None
    return embeddings


@pytest.fixture
def source(tmp_path: Path):
    return open_source(write_jsonl(tmp_path / "data", CAPTIONS))


@pytest.mark.parametrize(("dtype", "cosine"), [("float16", 0.999999), ("int8", 0.999)])
def test_round_trip_by_caption_in_any_order(source, tmp_path: Path, dtype: str, cosine: float) -> None:
    written = fill(tmp_path / "cache", source, dtype)
    cache = EmbeddingCache.open(tmp_path / "cache", expect_fingerprint=TEACHER.fingerprint, expect_width=WIDTH)
    cache.check(source)
    cache.verify()
    assert cache.width == WIDTH and cache.teacher == TEACHER and cache.manifest.captions == 7
    first = 0
    for number in range(len(source)):
        key, captions = source.captions(number)
        found = cache.rows(*source.locate(number), captions[::-1], key=key).flip(0)
        expected = written[first : first + len(captions)]
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert torch.nn.functional.cosine_similarity(found, expected).min() > cosine
        first += len(captions)


def test_int8_keeps_direction_and_length_over_many_rows_and_takes_half_the_space(tmp_path: Path) -> None:
    source = open_source(write_jsonl(tmp_path / "data", [[f"caption {i}"] for i in range(500)]))
    written = fill(tmp_path / "int8", source, "int8")
    fill(tmp_path / "float16", source)
    found = EmbeddingCache.open(tmp_path / "int8").shard("pairs").embeddings(range(len(written)))
    assert torch.nn.functional.cosine_similarity(found, written).min() > 0.999
    assert torch.allclose(found.norm(dim=1), written.norm(dim=1), rtol=2e-3)
    sizes = [(tmp_path / name / "pairs.safetensors").stat().st_size for name in ("int8", "float16")]
    assert sizes[0] < 0.55 * sizes[1]


def test_int8_refuses_rows_that_one_dimension_fills(tmp_path: Path) -> None:
    """Fifty dimensions of 12 beside one of 1,000: rounded in steps of 8, most of them are off by a third."""
    writer = CacheWriter(tmp_path, dataclasses.replace(TEACHER, width=4096), "int8")
    row = torch.full((1, 4096), 3.9)
    row[0, 0] = 1000.0
    with pytest.raises(ContractError, match=r"its int8 form is 0\.9\d+, .* --dtype float16"):
        writer.write_shard("s", ["k"], [(0, 0)], row)


def test_float16_holds_rows_beyond_its_range(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, dataclasses.replace(TEACHER, width=4))
    rows = torch.tensor([[3e5, -1.0, 2e4, 7.0], [0.5, 0.25, -0.125, 0.0]])
    writer.write_shard("s", ["k"], [(0, 0), (0, 1)], rows)
    writer.finish()
    found = EmbeddingCache.open(tmp_path).shard("s").embeddings(range(2))
    assert torch.allclose(found, rows, rtol=1e-3) and torch.isfinite(found).all()


def test_equal_captions_share_a_row_and_blank_ones_have_none() -> None:
    rows = caption_rows([[Caption("a"), Caption("a", kind="long"), Caption(" ")], [], [Caption("a")]])
    assert [index for index, _ in rows] == [0, 2]


def test_sample_without_captions_keeps_its_place(tmp_path: Path) -> None:
    source = open_source(write_jsonl(tmp_path / "data", [["a"], [], ["b"]]))
    written = fill(tmp_path / "cache", source)
    cache = EmbeddingCache.open(tmp_path / "cache")
    cache.check(source)
    assert cache.rows("pairs", 1, []).shape == (0, WIDTH)
    assert torch.allclose(cache.rows("pairs", 2, [Caption("b")])[0], written[1], rtol=1e-3, atol=1e-3)


def test_keys_that_utf8_cannot_hold_match_the_source(tmp_path: Path) -> None:
    source = open_source(write_jsonl(tmp_path, [["one"], ["two"]], prefix="\ud800"))
    fill(tmp_path / "cache", source)
    cache = EmbeddingCache.open(tmp_path / "cache")
    cache.check(source)
    key, captions = source.captions(1)
    assert cache.rows("pairs", 1, captions, key=key).shape == (1, WIDTH) and key == "\ufffd1"


def test_cache_goes_to_workers_without_its_files(source, tmp_path: Path) -> None:
    fill(tmp_path / "cache", source)
    cache = EmbeddingCache.open(tmp_path / "cache")
    captions = source.captions(0)[1]
    before = cache.rows("pairs", 0, captions)
    data = pickle.dumps(cache)
    assert len(data) < 4000  # far less than the rows
    assert torch.equal(pickle.loads(data).rows("pairs", 0, captions), before)


def test_another_llm_is_refused_with_both_fingerprints(source, tmp_path: Path) -> None:
    fill(tmp_path / "cache", source)
    other = dataclasses.replace(TEACHER, llm="models/other", weights_sha256="b" * 64)
    with pytest.raises(ContractError) as caught:
        EmbeddingCache.open(tmp_path / "cache", expect_fingerprint=other.fingerprint)
    assert other.fingerprint in str(caught.value) and TEACHER.fingerprint in str(caught.value)
    assert "models/tiny" in str(caught.value)
    with pytest.raises(ContractError, match=r"pooling 'mean' != 'last'.*choose another --cache"):
        CacheWriter(tmp_path / "cache", dataclasses.replace(TEACHER, pooling="last"))
    with pytest.raises(ContractError, match=r"has dtype float16, not int8; .* use --dtype float16"):
        CacheWriter(tmp_path / "cache", TEACHER, "int8")


def test_the_same_weights_in_another_folder_are_the_same_teacher(source, tmp_path: Path) -> None:
    fill(tmp_path / "cache", source)
    moved = dataclasses.replace(TEACHER, llm="/elsewhere/tiny", revision="main")
    EmbeddingCache.open(tmp_path / "cache", expect_fingerprint=moved.fingerprint)
    CacheWriter(tmp_path / "cache", moved)


def test_another_width_is_refused(source, tmp_path: Path) -> None:
    fill(tmp_path / "cache", source)
    with pytest.raises(ContractError, match=r"width 640 .* expected 4096"):
        EmbeddingCache.open(tmp_path / "cache", expect_width=4096)


def test_changed_caption_is_refused_with_both_hashes(source, tmp_path: Path) -> None:
    fill(tmp_path / "cache", source)
    changed = open_source(write_jsonl(tmp_path / "changed", [*CAPTIONS[:2], ["three dogs"], CAPTIONS[3]]))
    cache = EmbeddingCache.open(tmp_path / "cache")
    for read in (lambda: cache.check(changed), lambda: cache.rows("pairs", 2, changed.captions(2)[1])):
        with pytest.raises(
            ContractError, match=r"'k2': caption 'three dogs' \(hash \w{16}\) .* cached caption hashes: \w{16}"
        ):
            read()
    with pytest.raises(ContractError, match="caption ' ' is blank"):
        cache.rows("pairs", 0, [Caption(" ")])


def test_other_keys_and_counts_are_refused(source, tmp_path: Path) -> None:
    fill(tmp_path / "cache", source)
    cache = EmbeddingCache.open(tmp_path / "cache")
    renamed = open_source(write_jsonl(tmp_path / "renamed", CAPTIONS, prefix="image"))
    with pytest.raises(ContractError, match=r"sample 0 of shard 'pairs' has key 'image0' in .*, 'k0' in the cache"):
        cache.check(renamed)
    with pytest.raises(ContractError, match="has key 'image1' in the data, 'k1' in the cache"):
        cache.rows("pairs", 1, renamed.captions(1)[1], key="image1")
    longer = open_source(write_jsonl(tmp_path / "longer", [*CAPTIONS, ["one more"]]))
    with pytest.raises(ContractError, match=r"has 5 samples in .*, 4 when it was embedded"):
        cache.check(longer)
    with pytest.raises(ContractError, match="has no sample 4: shard 'pairs' had 4"):
        cache.rows("pairs", 4, longer.captions(4)[1])
    unknown = open_source(write_jsonl(tmp_path / "unknown", CAPTIONS, name="train"))
    with pytest.raises(ContractError, match="no shard 'train'; known: pairs; rerun"):
        cache.check(unknown)


def test_missing_shard_is_refused(source, tmp_path: Path) -> None:
    fill(tmp_path / "cache", source)
    (tmp_path / "cache" / "pairs.safetensors").unlink()
    told = r"pairs\.safetensors is missing, but the manifest lists shard 'pairs'; rerun `llm2clip embed`; complete"
    with pytest.raises(ContractError, match=told):
        EmbeddingCache.open(tmp_path / "cache")


def test_the_command_that_made_a_cache_is_part_of_its_errors(source, tmp_path: Path) -> None:
    fill(tmp_path / "cache", source)
    command = started_by("embed", ["my data/pairs.jsonl", "--llm", "models/llm"])
    EmbedRecord(data="my data/pairs.jsonl", shards=["pairs"], command=command).write(tmp_path / "cache/embed.json")
    (tmp_path / "cache" / "pairs.safetensors").write_bytes(b"cut")
    told = r"; rerun `llm2clip embed 'my data/pairs\.jsonl' --llm models/llm`; complete shards are skipped$"
    with pytest.raises(ContractError, match=told):
        EmbeddingCache.open(tmp_path / "cache")
    (tmp_path / "cache/embed.json").write_text("{")  # damaged as well
    with pytest.raises(ContractError, match=r"; rerun `llm2clip embed`; complete shards are skipped$"):
        EmbeddingCache.open(tmp_path / "cache")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_shard_is_refused(source, tmp_path: Path, share: float) -> None:
    fill(tmp_path / "cache", source)
    path = tmp_path / "cache" / "pairs.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ContractError, match=r"pairs\.safetensors is truncated or .*\(.+\); rerun `llm2clip embed"):
        EmbeddingCache.open(tmp_path / "cache")
    keys, captions = captions_of(source)
    assert not CacheWriter(tmp_path / "cache", TEACHER).is_complete("pairs", rows_digest(keys, caption_rows(captions)))


def test_flipped_bit_is_found_by_verify(source, tmp_path: Path) -> None:
    fill(tmp_path / "cache", source)
    path = tmp_path / "cache" / "pairs.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ContractError, match="is damaged: SHA-256"):
        EmbeddingCache.open(tmp_path / "cache").verify()


@pytest.mark.parametrize("word", ["data_offsets", "shape", "dtype", "F16", "row_starts", "__metadata__", "sha256"])
def test_a_damaged_header_is_refused_and_embedded_again(source, tmp_path: Path, word: str) -> None:
    fill(tmp_path / "cache", source)
    file = tmp_path / "cache" / "pairs.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(word.encode(), b"x" * len(word), 1))
    assert file.read_bytes() != whole
    with pytest.raises(ContractError, match=r"pairs\.safetensors is .* not a shard .*\(.+\); rerun `llm2clip embed"):
        EmbeddingCache.open(tmp_path / "cache")
    keys, captions = captions_of(source)
    assert not CacheWriter(tmp_path / "cache", TEACHER).is_complete("pairs", rows_digest(keys, caption_rows(captions)))


@pytest.mark.parametrize("field", ["file", "samples", "captions", "rows_sha256", "sha256"])
def test_a_manifest_without_a_field_is_refused(source, tmp_path: Path, field: str) -> None:
    fill(tmp_path / "cache", source)
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"{field}":', '"other":', 1))
    with pytest.raises(ContractError, match=f"shard 'pairs' is missing {field}"):
        EmbeddingCache.open(tmp_path / "cache")


def test_shard_of_another_cache_is_refused(source, tmp_path: Path) -> None:
    other = dataclasses.replace(TEACHER, pooling="last")
    fill(tmp_path / "cache", source)
    fill(tmp_path / "other", source, teacher=other)
    shutil.copy(tmp_path / "other" / "pairs.safetensors", tmp_path / "cache" / "pairs.safetensors")
    with pytest.raises(ContractError) as caught:
        EmbeddingCache.open(tmp_path / "cache")
    assert TEACHER.fingerprint in str(caught.value) and other.fingerprint in str(caught.value)


def test_unfinished_and_absent_caches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no llm2clip-cache at"):
        EmbeddingCache.open(tmp_path)
    CacheWriter(tmp_path / "cache", TEACHER)
    with pytest.raises(ContractError, match="incomplete: embedding has not finished"):
        EmbeddingCache.open(tmp_path / "cache")


def test_manifest_changed_by_hand_is_refused(source, tmp_path: Path) -> None:
    fill(tmp_path / "cache", source)
    path = tmp_path / "cache" / CacheManifest.FILE
    path.write_text(path.read_text().replace('"mean"', '"last"'))
    with pytest.raises(ContractError, match="was edited: it has fingerprint"):
        EmbeddingCache.open(tmp_path / "cache")


def test_manifest_cannot_lead_out_of_the_cache(source, tmp_path: Path) -> None:
    fill(tmp_path / "cache", source)
    path = tmp_path / "cache" / CacheManifest.FILE
    path.write_text(path.read_text().replace('"pairs.safetensors"', '"../pairs.safetensors"'))
    with pytest.raises(ContractError, match="is outside the cache"):
        EmbeddingCache.open(tmp_path / "cache")
    assert ".." not in shard_file("../pairs") and not Path(shard_file("/etc/pairs")).is_absolute()


def test_writer_refuses_bad_rows(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, TEACHER)
    with pytest.raises(ValueError, match=r"shape \(1, 8\), expected \(1, 640\)"):
        writer.write_shard("s", ["k"], [(0, 0)], torch.zeros(1, 8))
    with pytest.raises(ValueError, match="a caption of 'k' is not finite"):
        writer.write_shard("s", ["k"], [(0, 0)], torch.full((1, WIDTH), np.inf))
    with pytest.raises(ValueError, match="in order of sample"):
        writer.write_shard("s", ["k", "l"], [(1, 0), (0, 1)], torch.zeros(2, WIDTH))
    with pytest.raises(ValueError, match="unknown cache dtype 'fp8'; known: float16, int8"):
        CacheWriter(tmp_path, TEACHER, "fp8")
    assert not (tmp_path / "s.safetensors").exists()


def damage(path: Path, tensor: str, position: int, value: int | None = None) -> None:
    """Change one byte of a tensor in a shard's file."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    at = 8 + length + json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0] + position
    data[at] = data[at] ^ 1 if value is None else value
    path.write_bytes(data)


@pytest.mark.parametrize("tensor", ["embeddings", "scales", "row_checks"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_flipped_byte_is_found_when_its_row_is_read(source, tmp_path: Path, dtype: str, tensor: str) -> None:
    """The other rows are read; embedding again finds the shard damaged and writes it again."""
    fill(tmp_path / "cache", source, dtype)
    file = tmp_path / "cache" / "pairs.safetensors"
    cache = EmbeddingCache.open(tmp_path / "cache")
    whole = cache.shard("pairs").embeddings(range(7))
    damage(file, tensor, 0)
    cache = EmbeddingCache.open(tmp_path / "cache")
    cache.check(source)
    with pytest.raises(ContractError, match=r"pairs\.safetensors is damaged: row 0 .*; rerun `llm2clip embed`"):
        cache.rows("pairs", 0, source.captions(0)[1])
    with pytest.raises(ContractError, match="is damaged: row 0"):
        cache.shard("pairs").embeddings(range(7))
    assert torch.equal(cache.shard("pairs").embeddings(range(1, 7)), whole[1:])
    with pytest.raises(ContractError, match="is damaged: SHA-256"):
        cache.verify()


@pytest.mark.parametrize("tensor", ["embeddings", "scales", "row_checks", "caption_hashes", "keys", "row_starts"])
def test_a_damaged_shard_is_not_complete(source, tmp_path: Path, caplog: pytest.LogCaptureFixture, tensor: str) -> None:
    fill(tmp_path / "cache", source)
    keys, captions = captions_of(source)
    digest = rows_digest(keys, caption_rows(captions))
    writer = CacheWriter(tmp_path / "cache", TEACHER)
    assert writer.is_complete("pairs", digest) and not caplog.text
    damage(tmp_path / "cache" / "pairs.safetensors", tensor, 0)
    assert not writer.is_complete("pairs", digest)
    assert "is damaged: SHA-256" in caplog.text and "its captions are embedded again" in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("complete", "no", "complete is 'no', expected bool"),
        ("shards", [1], r"shards is \[1\], expected dict"),
        ("shards", {"pairs": 1}, r"shards\.pairs is 1, expected dict"),
        ("width", True, "width is True, expected int"),
    ],
)
def test_a_manifest_of_other_types_is_refused(source, tmp_path: Path, field: str, value: object, message: str) -> None:
    fill(tmp_path / "cache", source)
    path = tmp_path / "cache" / CacheManifest.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ContractError, match=rf"manifest\.json.*{message}"):
        EmbeddingCache.open(tmp_path / "cache")


@pytest.mark.parametrize("field", ["samples", "captions", "truncated", "sha256", "rows_sha256"])
def test_an_edited_entry_of_the_manifest_is_refused(source, tmp_path: Path, field: str) -> None:
    fill(tmp_path / "cache", source)
    path = tmp_path / "cache" / CacheManifest.FILE
    body = json.loads(path.read_text())
    value = body["shards"]["pairs"][field]
    body["shards"]["pairs"][field] = value + 1 if isinstance(value, int) else "0" * 64
    path.write_text(json.dumps(body))
    with pytest.raises(ContractError, match=rf"pairs\.safetensors differs from the manifest: {field} is .*, not"):
        EmbeddingCache.open(tmp_path / "cache")
