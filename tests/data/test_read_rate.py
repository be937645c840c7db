from pathlib import Path

import pytest
from data_world import jpeg, write_shards, write_tar

from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.remote import file_system, is_network
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.data.sources.tars import (
    NETWORK_WINDOW,
    describe_report,
    loose_images,
    read_rate,
    reading_report,
    shuffle_window,
)

MOUNTS = """\
overlay / overlay rw 0 0
/dev/sda1 /data ext4 rw 0 0
server:/export /data/cc3m nfs4 rw,vers=4.2 0 0
10.0.0.1@tcp:/lus /lustre lustre rw 0 0
mount-s3 /mnt/my\\040bucket fuse.mount-s3 rw 0 0
/dev/sdb1 /mnt/stick fuseblk rw 0 0
/dev/sdc1 /twice nfs rw 0 0
/dev/sdc1 /twice xfs rw 0 0
"""


@pytest.fixture
def mounts(tmp_path: Path) -> str:
    (tmp_path / "mounts").write_text(MOUNTS)
    return str(tmp_path / "mounts")


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/data/other/00000.tar", "ext4", False),
        ("/data/cc3m", "nfs4", True),
        ("/data/cc3m/{00000..00331}.tar", "nfs4", True),
        ("/data/cc3m-copy", "ext4", False),  # not inside /data/cc3m
        ("/lustre/a/b", "lustre", True),
        ("/mnt/my bucket/x", "fuse.mount-s3", True),
        ("/mnt/stick", "fuseblk", False),
        ("/twice", "xfs", False),
        ("/elsewhere", "overlay", False),
        ("https://host/{00..99}.tar", "url", True),
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str, network: bool, mounts: str) -> None:
    assert file_system(path, mounts) == kind
    assert is_network(path, mounts) == network


def test_the_order_is_what_the_disk_bears_unless_it_is_set(mounts: str) -> None:
    assert shuffle_window(-1, ["/data/a", "/elsewhere"], mounts) == 0
    assert shuffle_window(-1, ["/data/a", "/lustre/b"], mounts) == NETWORK_WINDOW
    assert shuffle_window(0, ["/lustre/b"], mounts) == 0
    assert shuffle_window(5, ["/data/a"], mounts) == 5
    assert file_system("/data/a", mounts + "-absent") == "" and shuffle_window(-1, ["/x"], mounts + "-absent") == 0
    with pytest.raises(ValueError, match="shuffle_window is -2"):
        SourceConfig(path="x", shuffle_window=-2)


def test_a_data_set_on_the_network_is_read_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [2] * 40)
    dataset = PairDataset([open_source(SourceConfig(path=str(tmp_path)))], [None], ImageConfig(size=8), seed=0)
    assert dataset.mixture().windows == [0]
    monkeypatch.setattr("llm2clip_plugin.data.remote.file_system", lambda path, mounts: "nfs4")
    draws = dataset.mixture().batch_indices(0, 2 * NETWORK_WINDOW)
    assert len({draw.index // 2 for draw in draws}) == NETWORK_WINDOW


def test_what_a_run_asks_of_the_disk() -> None:
    common = {"images": 2000.0, "mean_bytes": 1e5, "shards": 1500, "samples": 15_000_000, "processes": 64}
    whole = read_rate(**common, window=0)
    assert whole.opens == pytest.approx(2000 * (1 - 64 / 1500)) and whole.bytes == 2e8
    # a window of 16 x 10,000 samples lasts 80 s; 64 processes open its 16 shards
    assert read_rate(**common, window=16).opens == pytest.approx(64 * 16 / 80)
    assert str(whole) == "2,000 images/s: 1,915 opens/s, 2,000 samples read/s, 200 MB/s"
    few = {**common, "shards": 20}
    assert read_rate(**few, window=0).opens == 0  # all stay open
    assert read_rate(**few, window=0, loose=0.5).opens == 1000  # half of the images are files


def test_images_that_are_files_are_opened(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("0.jpg", jpeg(0)), ("0.txt", b"t"), ("1.txt", b"no image")])
    (tmp_path / "rows.jsonl").write_text('{"image": "x.jpg", "caption": "t"}\n')
    sources = [open_source(SourceConfig(path=str(path))) for path in (tar, tmp_path / "rows.jsonl")]
    report = reading_report(sources[1], 1e5)
    assert describe_report(report).endswith(
        "any order; 64 loader processes at 1,000 images/s: 1,000 opens/s, 1,000 samples read/s, 100 MB/s"
    )
    assert loose_images(sources) == pytest.approx(1 / 3)
