import json
import os
import pickle
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from data_world import LengthEncoder, img2dataset_members, jpeg, write_shards, write_tar

from llm2clip_plugin.data import sources
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.samples import BrokenSample, Caption
from llm2clip_plugin.data.sources import SourceConfig, formats, open_source
from llm2clip_plugin.text.embed import embed_source


def config(path: object, **settings: object) -> SourceConfig:
    return SourceConfig(path=str(path), **settings)  # type: ignore[arg-type]


def test_img2dataset_tars(tmp_path: Path) -> None:
    source = open_source(config(write_shards(tmp_path, [3, 2])))
    assert [(shard.name, shard.size, shard.start) for shard in source.shards] == [
        ("00000", 3, 0),
        ("00001", 2, 3),
    ]
    assert len(source) == 5
    assert source.locate(4) == ("00001", 1)
    sample = source[3]
    assert sample.key == "000000003"
    assert sample.read_image() == jpeg(3)
    assert sample.meta["url"] == "https://host/3.jpg"
    long = Caption("a longer text about the picture with number 3", "long")
    assert sample.captions == (Caption("picture number 3"), long)
    assert source.captions(3) == (sample.key, sample.captions)


def test_shard_names_hold_the_folder(tmp_path: Path) -> None:
    for name in ("train/00000.tar", "train/00001.tar", "more/00000.tar"):
        write_tar(tmp_path / name, img2dataset_members(0, 1))
    for path, names in {
        ".": ["more/00000", "train/00000", "train/00001"],
        "train/{00000..00001}.tar": ["00000", "00001"],
        "train/*1.tar": ["00001"],
        "more/00000.tar": ["00000"],
    }.items():
        assert [
            shard.name for shard in open_source(config(tmp_path / path)).shards
        ] == names


def test_shard_names_do_not_depend_on_how_the_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "a" / "data", [1])
    monkeypatch.chdir(tmp_path / "a" / "data")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "data")
    whole = str(tmp_path / "a" / "data")
    link = str(tmp_path / "link")
    for path in (
        ".",
        "./",
        "../data",
        "../../a/data/",
        "./*.tar",
        "00000.tar",
        whole,
        f"{whole}/",
        link,
        f"{link}/",
    ):
        assert [shard.name for shard in open_source(config(path)).shards] == [
            "00000"
        ], path
    monkeypatch.chdir(tmp_path)
    assert [shard.name for shard in open_source(config(".")).shards] == ["a/data/00000"]


def test_a_source_is_pickled_without_its_index(tmp_path: Path) -> None:
    source = open_source(config(write_shards(tmp_path, [2])))
    assert len(pickle.dumps(source)) < 2000
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


BROKEN = {
    "no image": ([("a.txt", b"text")], "no .jpg"),
    "bad JSON": ([("a.jpg", b"x"), ("a.json", b"{not json")], "not valid JSON"),
    "JSON list": (
        [("a.jpg", b"x"), ("a.json", b"[1]")],
        "contains a list, expected an object",
    ),
    "JSON nested too deep": (
        [("a.jpg", b"x"), ("a.json", b"[" * 200_000)],
        "nested too deep",
    ),
    "number for a caption": (
        [("a.jpg", b"x"), ("a.json", b'{"caption": 3}')],
        "'caption' has type int",
    ),
}


@pytest.mark.parametrize("members, says", BROKEN.values(), ids=BROKEN)
def test_broken_samples_are_named_and_have_no_captions(
    tmp_path: Path, members: list, says: str
) -> None:
    source = open_source(config(write_tar(tmp_path / "shard.tar", members)))
    with pytest.raises(BrokenSample, match=says) as caught:
        source[0].read_image()
    assert caught.value.shard == "shard"
    assert caught.value.key == "a"
    key, captions = source.captions(0)
    assert key == "a"
    assert captions == ((Caption("text"),) if says == "no .jpg" else ())


def test_jsonl_with_an_image_folder(tmp_path: Path) -> None:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "sub" / "a.jpg").write_bytes(jpeg(0))
    rows = [
        {"id": "one", "image": "sub/a.jpg", "caption": "short", "long_caption": "long"},
        {"image": "sub/a.jpg", "caption": ["x", "y"]},
        {"id": 0, "image": "sub/a.jpg", "caption": "z"},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    source = open_source(config(file, images=str(tmp_path / "images")))
    assert [(shard.name, shard.size) for shard in source.shards] == [("data", 3)]
    assert source[0].captions == (Caption("short"), Caption("long", "long"))
    assert source[0].read_image() == jpeg(0)
    assert source[1].key == "sub/a.jpg"
    assert source[1].captions == (Caption("x"), Caption("y"))
    assert source[2].key == "0"
    assert pickle.loads(pickle.dumps(source))[0] == source[0]


def test_jsonl_rows_that_are_broken(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg(0))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "whole.jpg").write_bytes(jpeg(0))
    rows = {
        "{broken": "not valid JSON",
        "[1]": "contains a list",
        "[" * 200_000: "not valid JSON",
        '{"id": "a", "image": "none.jpg"}': "no image 'none.jpg'",
        '{"id": "b", "image": "../secret.jpg"}': "image '../secret.jpg' is not a path inside",
        '{"id": "c"}': "no image path in field 'image'",
        '{"id": "e\\ud800", "image": "\\ud800.jpg"}': "is not a path inside",
        json.dumps(
            {"id": "f", "image": "data:image/png;base64," + "iVBORw0KGgo" * 1000}
        ): "no image 'data:image/png",
        '{"id": "g", "image": "whole.jpg/a.jpg"}': "no image 'whole.jpg/a.jpg'",
        '{"id": "h", "caption": "x", "caption": "y"}': "an object has the name 'caption' twice",
        '{"id": "i", "image": "../../../../../etc/passwd"}': "is not a path inside",
        '{"id": "j", "image": "/etc/passwd"}': "image '/etc/passwd' is not a path inside",
        '{"id": "k", "image": "pipe.jpg"}': (
            "image 'pipe.jpg': not a regular file, but a pipe or a device"
        ),
        '{"id": "l", "image": "zero.jpg"}': (
            "image 'zero.jpg': not a regular file, but a pipe or a device"
        ),
    }
    os.mkfifo(tmp_path / "images" / "pipe.jpg")
    (tmp_path / "images" / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    source = open_source(
        config(tmp_path / "data.jsonl", images=str(tmp_path / "images"))
    )
    keys = []
    for number, says in enumerate(rows.values()):
        with pytest.raises(BrokenSample) as caught:
            source[number].read_image()
        assert says in caught.value.reason
        keys.append(source.captions(number)[0])
    assert keys == [
        "line 1",
        "line 2",
        "line 3",
        "a",
        "b",
        "c",
        "e\ufffd",
        "f",
        "g",
        "line 10",
        *"ijkl",
    ]


def test_llavas_pretraining_json(tmp_path: Path) -> None:
    (tmp_path / "00453").mkdir()
    (tmp_path / "00453" / "1.jpg").write_bytes(jpeg(0))
    texts = (
        "Summarize the photo.\n<image>",
        "<image>\nselect luxury furniture",
        "And?",
        "a second answer",
    )
    said = [
        {"from": ("human", "gpt")[number % 2], "value": text}
        for number, text in enumerate(texts)
    ]
    items = [
        {"id": "004539375", "image": "00453/1.jpg", "conversations": said},
        {"id": "text-only", "conversations": said},
        {
            "id": "odd",
            "image": "00453/1.jpg",
            "conversations": [{"value": "no speaker"}],
        },
    ]
    (tmp_path / "chat.json").write_text(json.dumps(items))
    source = open_source(config(tmp_path / "chat.json"))
    assert len(source) == 2  # what has no image is no pair
    assert source[0].key == "004539375"
    assert source[0].captions == (Caption("select luxury furniture"),)
    with pytest.raises(BrokenSample, match="invalid conversations"):
        source[1]
    for text, says in {
        '[{"id": "a", "id": "b", "image": "x"}]': "name 'id' twice",
        "[" * 100_000: "too deep",
    }.items():
        (tmp_path / "damaged.json").write_text(text)
        with pytest.raises(ValueError, match=f"damaged.json is not valid JSON.*{says}"):
            open_source(config(tmp_path / "damaged.json"))


# A format of captioned images is one new file: it is listed, recognized, checked, embedded and
# trained on.

EXTENDING = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(
    encoding="utf-8"
)
CSV = re.search(r'```python\n("""CSV .*?)```', EXTENDING, re.DOTALL)[1]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A .csv of four pictures, and the file that reads it in a folder of its own."""
    (tmp_path / "formats").mkdir()
    (tmp_path / "formats" / "csv_rows.py").write_text(CSV)
    monkeypatch.setattr(
        sources, "__path__", [*sources.__path__, str(tmp_path / "formats")]
    )
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    lines = [
        "id,image,caption",
        *(
            f'k{number},{number}.jpg,"a picture, number {number}"'
            for number in range(4)
        ),
    ]
    (tmp_path / "pictures.csv").write_text("\n".join(lines))
    yield tmp_path / "pictures.csv"
    sys.modules.pop("llm2clip_plugin.data.sources.csv_rows", None)


def test_it_is_recognized_embedded_and_trained_on(table: Path) -> None:
    assert formats()["csv"].recognizes("https://host/x.csv?token=1")
    source = open_source(SourceConfig(path=str(table)))
    encoder: Any = LengthEncoder()
    manifest, _ = embed_source(source, encoder, table.parent / "cache", quiet=True)
    assert manifest is not None
    assert manifest.captions == 4
    dataset = PairDataset(
        [source],
        [EmbeddingCache.open(table.parent / "cache")],
        ImageConfig(size=16),
        seed=0,
    )
    (batch,) = islice(PairLoader(dataset, local_batch=4, workers=1), 1)
    assert sorted(batch["keys"]) == ["k0", "k1", "k2", "k3"]
    assert batch["embeddings"][:, 0].tolist() == [
        float(len(caption)) for caption in batch["captions"]
    ]
