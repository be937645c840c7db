import gzip
import os
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from data_world import jpeg, write_shards, write_tar

from llm2clip_plugin.data import remote
from llm2clip_plugin.data.samples import BrokenSample
from llm2clip_plugin.data.sources import (
    BrokenShard,
    SourceConfig,
    open_source,
    scan_tar,
)
from llm2clip_plugin.data.sources import tars as tars_module
from llm2clip_plugin.data.sources.tars import index_tar

LONG = "folder/" * 20 + "a" * 120  # past ustar's 100 and 155 characters
NAMES = [
    "a.txt",
    "folder/b.jpg",
    "ünïcode.json",
    "folder/" * 14 + "in-the-prefix.txt",
    LONG + ".txt",
]


def keys(path: Path) -> list[str]:
    shard = index_tar(path)
    return [
        shard.text[start : start + size].decode()
        for size, start in shard.rows[:, [2, 5]].tolist()
    ]


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_samples_of_any_format_are_read(tmp_path: Path, tar_format: int) -> None:
    names = NAMES[:-1] if tar_format == tarfile.USTAR_FORMAT else NAMES
    path = write_tar(
        tmp_path / "x.tar", [(name, b"{}" + b" " * 600) for name in names], tar_format
    )
    source = open_source(SourceConfig(path=str(path)))
    assert [source.key(number) for number in range(len(source))] == [
        name.partition(".")[0] for name in names
    ]
    assert [source.record(number).key for number in range(len(source))] == keys(path)


def test_folders_and_links_are_not_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (
            ("folder", tarfile.DIRTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "/etc/passwd"
            tar.addfile(info)
    assert list(scan_tar(tmp_path / "x.tar")) == []


def retyped(data: bytes, offset: int, kind: bytes) -> bytes:
    """Another type of the member whose header is at ``offset``, with the checksum of that."""
    header = bytearray(data[offset : offset + 512])
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:offset] + bytes(header) + data[offset + 512 :]


def damaged(whole: bytes) -> dict[str, bytes]:
    """``whole``: a.txt of 200 bytes, b.txt of 1 byte; two blocks each."""
    pax = whole.replace(b"x" * 200, b"17 size=-0001024\n" + b"\0" * 183)
    return {
        "empty": b"",
        "cut in a member": whole[: 512 + 100],
        "cut in a header": whole[: 1024 + 100],
        "cut between members": whole[:1024],
        "cut after the last member": whole[:2048],
        "compressed": gzip.compress(os.urandom(2000)),
        "first header": b"y" + whole[1:],
        "second header": whole[:1024] + b"y" + whole[1025:],
        "negative size": retyped(
            pax, 0, b"x"
        ),  # leads back to the header before, for ever
    }


@pytest.mark.parametrize("name", damaged(b""))
def test_damaged_tars_are_named(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"x" * 200), ("b.txt", b"y")])
    path.write_bytes(damaged(path.read_bytes())[name])
    with pytest.raises(BrokenShard, match=r"x\.tar"):
        list(scan_tar(path))


def test_members_are_joined_by_key_in_any_order(tmp_path: Path) -> None:
    names = (
        "1.jpg 2.PNG 2.txt x/1.webp 1.json ._1.jpg x/.hidden noextension 1.seg.png 3.txt "
        "1.jpg 1.txt"
    ).split()
    path = write_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names])
    # offset of the image, sizes of .txt and .json
    parts = []
    for row in index_tar(path).rows[:, [0, 3, 4]].tolist():
        letters = [
            letter for letter, number in zip("itj", row, strict=True) if number >= 0
        ]
        parts.append("".join(letters))
    assert list(zip(keys(path), parts, strict=True)) == [
        # a part that repeats begins a sample
        ("1", "ij"),
        ("2", "it"),
        ("x/1", "i"),
        ("3", "t"),
        ("1", "it"),
    ]


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tars that are read, from now on."""
    names: list[str] = []
    monkeypatch.setattr(
        tars_module,
        "index_tar",
        lambda path: names.append(path.name) or index_tar(path),
    )
    return names


def test_only_new_and_changed_tars_are_read_again(
    tmp_path: Path, indexed: list[str]
) -> None:
    write_shards(tmp_path, [2, 3])
    first = open_source(SourceConfig(path=str(tmp_path)))
    assert indexed == ["00000.tar", "00001.tar"]
    assert open_source(SourceConfig(path=str(tmp_path))).shards == first.shards
    assert len(indexed) == 2
    write_tar(tmp_path / "00002.tar", [("new.jpg", jpeg(9))])
    os.utime(tmp_path / "00001.tar", ns=(1, 1))  # the same size, another time
    del indexed[:]
    third = open_source(SourceConfig(path=str(tmp_path)))
    assert indexed == ["00001.tar", "00002.tar"]
    assert [third.key(number) for number in range(6)] == [
        f"{number:09d}" for number in range(5)
    ] + ["new"]


def test_a_new_tar_is_appended_to_the_index(tmp_path: Path) -> None:
    """What was indexed stays where it is, until most of the file is of tars that were replaced."""
    first: Any = open_source(SourceConfig(path=str(write_shards(tmp_path, [40, 40]))))
    write_tar(tmp_path / "00000-a.tar", [("new.jpg", jpeg(9))])
    (index,) = (tmp_path / ".llm2clip").glob("shards-*.index")
    end = first._index.end
    sizes = []
    before = index.read_bytes()[256:end]
    for time in range(1, 9):
        assert open_source(SourceConfig(path=str(tmp_path))).record(80) == first.record(
            79
        )
        sizes.append(index.stat().st_size)
        assert time > 1 or index.read_bytes()[256:end] == before
        for tar in tmp_path.glob("*.tar"):
            os.utime(tar, ns=(time, time))
    assert end < sizes[0] < max(sizes) < 4 * end


def test_many_tars_are_indexed_by_processes_and_errors_come_in_order(
    tmp_path: Path,
) -> None:
    write_shards(tmp_path, [1] * 20)
    for name in ("00003", "00007"):
        (tmp_path / f"{name}.tar").write_bytes(
            (tmp_path / f"{name}.tar").read_bytes()[:2000]
        )
    with pytest.raises(BrokenShard, match=r"00003\.tar"):
        open_source(SourceConfig(path=str(tmp_path)))
    broken: dict[str, str] = {}
    assert len(open_source(SourceConfig(path=str(tmp_path)), broken)) == 18
    assert list(broken) == [
        "00003",
        "00007",
    ]


@pytest.mark.parametrize("damage", ["head", "table", "cut", "empty", "other"])
def test_a_damaged_index_is_built_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    source = open_source(SourceConfig(path=str(write_shards(tmp_path, [1, 2]))))
    (index,) = (tmp_path / ".llm2clip").glob("shards-*.index")
    whole = index.read_bytes()
    table = whole.replace(b'"samples":[1', b'"samples":[7')
    bad = {
        "head": b"x" + whole[1:],
        "table": table,
        "cut": whole[:-9],
        "empty": b"",
        "other": b"{}\n",
    }
    index.write_bytes(bad[damage])
    assert open_source(SourceConfig(path=str(tmp_path))).shards == source.shards
    assert index.read_bytes() == whole
    assert "built again" in caplog.text


def test_in_a_read_only_folder_the_index_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indexed: list[str]
) -> None:
    monkeypatch.setenv("LLM2CLIP_CACHE", str(tmp_path / "spare"))
    data = write_shards(tmp_path / "data", [2])
    write = remote.atomic_file

    # as a read-only folder does; modes don't stop a test that runs as root
    def refuse(target: Path):
        if target.is_relative_to(data):
            raise OSError(30, "Read-only file system", str(target))
        return write(target)

    monkeypatch.setattr(remote, "atomic_file", refuse)
    for _ in range(2):
        assert len(open_source(SourceConfig(path=str(data)))) == 2
    assert indexed == ["00000.tar"]
    assert len(list((tmp_path / "spare").glob("*/shards-*.index"))) == 1


def test_a_tar_replaced_under_a_run_is_noticed(tmp_path: Path) -> None:
    source = open_source(SourceConfig(path=str(write_shards(tmp_path, [3]))))
    captions = source.captions(0)
    write_shards(tmp_path, [12])
    assert source.captions(0) == captions  # the index has them
    with pytest.raises(ValueError, match="was replaced") as caught:
        source[0].read_image()
    # which training would only replace
    assert not isinstance(caught.value, BrokenSample)


def test_digests_tell_that_a_picture_was_replaced(tmp_path: Path) -> None:
    probed = 2 * 3  # of 600 pictures, every third one
    pictures = [b"%d" % (1000 + number) for number in range(600)]

    def digests(name: str, changes: dict[int, bytes]) -> dict[str, str]:
        changed = dict(enumerate(pictures)) | changes
        members = [(f"{number}.jpg", data) for number, data in changed.items()]
        path = write_tar(tmp_path / name / "00000.tar", members)
        return open_source(SourceConfig(path=str(path.parent))).picture_digests()

    before = digests("before", {})
    assert digests("copy", {}) == before
    longer = digests("longer", {probed + 1: b"more bytes"})
    assert longer["content"] == before["content"]
    assert longer["sizes"] != before["sizes"]
    other = digests("other", {probed: b"0000"})
    assert other["content"] != before["content"]
    assert other["sizes"] == before["sizes"]


def test_digests_of_pictures_at_a_url_need_no_download(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", [3, 2])
    expected = open_source(SourceConfig(path=str(folder))).picture_digests()
    memory = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        memory.pipe_file(f"/pictures/{path.name}", path.read_bytes())
    cache = tmp_path / "cache"
    url = "memory://pictures/"
    source = open_source(SourceConfig(path=url, cache_folder=str(cache)))
    for tar in cache.rglob("*.tar"):
        tar.unlink()
    assert source.picture_digests() == {"sizes": expected["sizes"], "content": ""}
    assert not list(cache.rglob("*.tar"))
