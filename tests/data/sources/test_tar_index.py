import gzip
import os
import tarfile
from pathlib import Path

import pytest
from data_world import write_tar

from llm2clip_plugin.data import index as tar_index
from llm2clip_plugin.data.index import ABSENT, BrokenShard, group_samples, open_index, scan_tar

LONG = "folder/" * 20 + "a" * 120  # past ustar's 100 and 155 characters
NAMES = ["a.txt", "folder/b.jpg", "ünïcode.json", "folder/" * 14 + "in-the-prefix.txt", LONG + ".txt"]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_equals_tarfile(tmp_path: Path, tar_format: int) -> None:
    names = NAMES[:-1] if tar_format == tarfile.USTAR_FORMAT else NAMES
    sizes = (0, 1, 511, 512, 513)
    path = write_tar(
        tmp_path / "x.tar", [(name, b"x" * size) for name, size in zip(names, sizes, strict=False)], tar_format
    )
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar.getmembers()]
    assert [tuple(member) for member in scan_tar(path)] == expected


def test_folders_and_links_are_not_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert list(scan_tar(tmp_path / "x.tar")) == []


def test_sizes_in_base_256(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"abc"), ("b.txt", b"d")])
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (3).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path.write_bytes(data)
    assert [(member.name, member.size) for member in scan_tar(path)] == [("a.txt", 3), ("b.txt", 1)]


@pytest.mark.parametrize(
    "keep, says", [(0, "is empty"), (512 + 100, "truncated: 'a.txt'"), (512 + 512, "no end-of-archive marker")]
)
def test_a_cut_tar_is_named(tmp_path: Path, keep: int, says: str) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"x" * 200), ("b.txt", b"y")])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BrokenShard, match=says):
        list(scan_tar(path))


def test_compressed_and_damaged_tars_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"x"), ("b.txt", b"y")])
    (tmp_path / "z.tar").write_bytes(gzip.compress(os.urandom(2000)))
    with pytest.raises(BrokenShard, match="no tar header at byte 0: compressed; decompress"):
        list(scan_tar(tmp_path / "z.tar"))
    data = bytearray(path.read_bytes())
    data[1024] ^= 1  # first byte of the second header
    path.write_bytes(data)
    with pytest.raises(BrokenShard, match="no tar header at byte 1024"):
        list(scan_tar(path))


@pytest.mark.parametrize(
    "records, says",
    [
        (b"17 size=-0001024\n", "size of -1024"),  # would lead back to the header before, for ever
        (b"11 size=ab\n", "invalid literal"),
        (b"0 size=1\n", "record of 0 bytes"),  # the same record for ever
        (b"size=1\n", "invalid literal"),
    ],
)
def test_wrong_sizes_in_pax_headers_are_named(tmp_path: Path, records: bytes, says: str) -> None:
    path = write_tar(tmp_path / "x.tar", [("pax", records), ("a.txt", b"x")])
    data = bytearray(path.read_bytes())
    data[156:157] = b"x"  # the first member is the second one's pax header
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path.write_bytes(data)
    with pytest.raises(BrokenShard, match=f"x.tar: .*{says}"):
        list(scan_tar(path))


def test_members_are_joined_by_key_in_any_order(tmp_path: Path) -> None:
    names = [
        "1.jpg",
        "2.PNG",
        "2.txt",
        "x/1.webp",
        "1.json",
        "._1.jpg",
        "x/.hidden",
        "noextension",
        "1.seg.png",
        "3.txt",
    ]
    samples = group_samples(scan_tar(write_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names])))
    parts = {
        sample.key: [part for part in ("image", "text", "json") if getattr(sample, part)[0] != ABSENT]
        for sample in samples
    }
    assert parts == {"1": ["image", "json"], "2": ["image", "text"], "x/1": ["image"], "3": ["text"]}


def test_a_duplicate_key_is_two_samples(tmp_path: Path) -> None:
    names = ["1.jpg", "1.txt", "1.jpg", "1.txt"]
    samples = group_samples(scan_tar(write_tar(tmp_path / "x.tar", [(name, b"x") for name in names])))
    assert [sample.key for sample in samples] == ["1", "1"]
    assert all(sample.image[0] != ABSENT and sample.text[0] != ABSENT for sample in samples)


def test_the_index_is_kept_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar", [("1.jpg", b"abc"), ("1.txt", b"text"), ("ü.jpg", b"d")])
    first = open_index(path, tmp_path / "spare")
    assert [entry.key for entry in (first[0], first[1])] == ["1", "ü"]
    assert (tmp_path / ".x.tar.index").exists() and not (tmp_path / "spare").exists()
    scans = []
    scan = tar_index.scan_tar
    monkeypatch.setattr(tar_index, "scan_tar", lambda path: scans.append(path) or scan(path))
    again = open_index(path, tmp_path / "spare")
    assert scans == [] and [again[i] for i in range(2)] == [first[i] for i in range(2)]
    write_tar(path, [("2.jpg", b"abc"), ("1.txt", b"text"), ("3.jpg", b"d")])
    os.utime(path, ns=(1, 1))  # the same size, another time
    assert open_index(path, tmp_path / "spare")[0].key == "2" and len(scans) == 1


@pytest.mark.parametrize("damage", ["cut", "garbage", "other"])
def test_a_damaged_index_is_built_again(tmp_path: Path, damage: str) -> None:
    path = write_tar(tmp_path / "x.tar", [("1.jpg", b"abc"), ("2.jpg", b"d")])
    open_index(path, tmp_path)
    index = tmp_path / ".x.tar.index"
    data = index.read_bytes()
    index.write_bytes({"cut": data[:-1], "garbage": b"\xff" * 100, "other": b'{"kind": "other"}\n'}[damage])
    assert [open_index(path, tmp_path)[i].key for i in range(2)] == ["1", "2"]
    assert index.read_bytes() == data


def test_the_index_goes_elsewhere_where_the_folder_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "data" / "x.tar", [("1.jpg", b"abc")])
    write = tar_index.atomic_file

    def refuse(target: Path):  # as a read-only folder does; modes don't stop a test that runs as root
        if target.parent == path.parent:
            raise PermissionError(13, "Permission denied", str(target))
        return write(target)

    monkeypatch.setattr(tar_index, "atomic_file", refuse)
    assert open_index(path, tmp_path / "spare")[0].key == "1"
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["x.tar"]
    assert len(list((tmp_path / "spare").glob(".*.index"))) == 1
    assert open_index(path, tmp_path / "spare")[0].key == "1"


def test_a_tar_without_samples_has_an_empty_index(tmp_path: Path) -> None:
    assert len(open_index(write_tar(tmp_path / "x.tar", [("readme", b"x")]), tmp_path)) == 0
