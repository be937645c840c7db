"""Local reads that fail for a while: reopened, repeated, counted; those that fail for good are not."""

import errno
import os
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from data_world import TEACHER, img2dataset_members, jpeg, write_shards, write_tar

from llm2clip_plugin.data import remote as retry_module
from llm2clip_plugin.data.cache import CacheWriter, EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.index import scan_tar
from llm2clip_plugin.data.loader import make_loader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.remote import SteadyFile, read_file, take_retries
from llm2clip_plugin.data.samples import BrokenSample
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.data.sources.tars import GAP, join_parts
from llm2clip_plugin.hub import Retry

pread = os.pread


class Disk:
    """The real disk, which counts reads of tars and cache shards and fails as often as ``failures`` says."""

    def __init__(self) -> None:
        self.reads: list[tuple[str, int, int]] = []  # file name, size, offset
        self.failures: list[int] = []

    def pread(self, descriptor: int, size: int, offset: int) -> bytes:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name.endswith((".tar", ".safetensors")):
            self.reads.append((name, size, offset))
            if self.failures:
                number = self.failures.pop(0)
                raise OSError(number, os.strerror(number))
        return pread(descriptor, size, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(os, "pread", disk.pread)
    monkeypatch.setattr(retry_module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(retry_module, "_retries", [0, 0])
    yield disk


def source_of(folder: Path) -> Source:
    return open_source(SourceConfig(path=str(folder)))


def test_a_sample_is_one_read_and_its_captions_leave_the_image_out(tmp_path: Path, disk: Disk) -> None:
    source = source_of(write_shards(tmp_path, [3]))
    for number in range(3):
        disk.reads.clear()
        sample = source.with_image(number)
        assert sample.read_image() == jpeg(number) and len(disk.reads) == 1
        disk.reads.clear()
        assert source[number] == sample and len(disk.reads) == 1
        assert disk.reads[0][1] < len(jpeg(number))
        assert source[number].read_image() == jpeg(number)


def test_distant_parts_are_read_apart(tmp_path: Path, disk: Disk) -> None:
    a, b, c = img2dataset_members(0, 1)
    source = source_of(write_tar(tmp_path / "x.tar", [a, ("000000000.npy", bytes(1_000_000)), b, c]).parent)
    disk.reads.clear()
    sample = source.with_image(0)
    assert sample.read_image() == jpeg(0) and sample.captions
    assert len(disk.reads) == 2 and sum(size for _, size, _ in disk.reads) < 20_000
    assert join_parts([(900, 10), (0, 100), (910 + GAP, 5), (916 + 2 * GAP, 5)]) == [
        [(0, 100), (900, 10), (910 + GAP, 5)],
        [(916 + 2 * GAP, 5)],
    ]
    assert join_parts([]) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_read_that_fails_for_a_while_is_repeated(
    number: int, tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(write_shards(tmp_path, [2]))
    expected = source.with_image(1)
    stale = open("/dev/null", "rb")
    os.dup2(stale.fileno(), source._files[0]._descriptor)  # type: ignore[attr-defined]
    stale.close()  # the source's descriptor now fails until the tar is opened again
    disk.failures = [number, number]
    disk.reads.clear()

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}") == "/dev/null":
            raise OSError(number, os.strerror(number))
        return disk.pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert source.with_image(1) == expected and take_retries() == 3
    assert os.strerror(number) in caplog.text and "00000.tar" in caplog.text and "retrying" in caplog.text


def test_it_ends_in_an_error_that_names_the_file(tmp_path: Path, disk: Disk) -> None:
    source = source_of(write_shards(tmp_path, [2]))
    disk.failures = [errno.EIO] * 100
    with pytest.raises(ConnectionError, match=r"failed 8 times in a row: .*00000\.tar: OSError.*rerun the same"):
        source.with_image(0)
    disk.failures = [errno.EACCES]
    with pytest.raises(PermissionError):
        source.with_image(0)
    assert take_retries() == 7
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"no shard at .*00000\.tar"):
        source_of_pickled(source).with_image(0)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none.jpg")
    with pytest.raises(FileNotFoundError):
        SteadyFile(tmp_path / "none.tar")
    assert take_retries() == 0


def test_a_cache_and_the_headers_of_a_tar_are_read_again(tmp_path: Path, disk: Disk) -> None:
    (tar,) = sorted(write_shards(tmp_path / "data", [2]).glob("*.tar"))
    writer = CacheWriter(tmp_path / "cache", TEACHER)
    rows = torch.arange(2.0 * TEACHER.width).reshape(2, -1)
    writer.write_shard("00000", ["a", "b"], [(0, 0), (1, 1)], rows)
    writer.finish()
    members, shard = list(scan_tar(tar)), EmbeddingCache.open(tmp_path / "cache").shard("00000")
    take_retries()
    disk.failures = [errno.EIO, errno.ESTALE]
    assert list(scan_tar(tar)) == members
    disk.failures = [errno.EIO, errno.ESTALE]
    assert torch.equal(shard.embeddings([0, 1]), rows)
    assert take_retries() == 4


def source_of_pickled(source: Source) -> Source:
    return pickle.loads(pickle.dumps(source))


def test_loader_processes_report_their_retries(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    """Each of two forked processes meets three failures."""
    source = source_of(write_shards(tmp_path, [8]))
    disk.failures = [errno.ESTALE] * 3
    loader = make_loader(PairDataset([source], [None], ImageConfig(size=8), seed=0), local_batch=4, workers=2)
    batches = list(islice(iter(loader), 4))
    assert loader.retries == 6 and [batch["retries"] for batch in batches][-1] == 6
    del batches, loader
    assert "retried 6 reads" in caplog.text


def test_a_tar_that_changed_after_it_was_indexed_is_noticed(tmp_path: Path) -> None:
    """Its size and time are the old ones, its samples are in another order."""
    members = list(img2dataset_members(0, 2))
    tar = write_tar(tmp_path / "x.tar", members)
    source = source_of(tmp_path)
    status = tar.stat()
    write_tar(tar, members[3:] + members[:3])
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert tar.stat().st_size == status.st_size
    with pytest.raises(
        BrokenSample, match=r"'000000000' .*another member at byte \d+.*run `touch .*x\.tar` and restart"
    ):
        source.with_image(0)
    tar.touch()
    assert [source_of(tmp_path)[number].key for number in range(2)] == ["000000001", "000000000"]


def test_pauses_grow_and_differ() -> None:
    retry = Retry(first_pause=1.0, longest_pause=30.0)
    for failures, full in ((1, 1), (2, 2), (4, 8), (9, 30)):
        pauses = [retry.pause(failures) for _ in range(20)]
        assert full / 2 <= min(pauses) < max(pauses) <= full
