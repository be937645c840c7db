"""llm2clip data split: the same sides in any order of shards, groups on one side, nothing lost,
whole or not at all."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from data_world import write_tar
from tiny_data import make_shards

from llm2clip_plugin.cli import run
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source
from llm2clip_plugin.data.split import SIDES, decide, hash_of, is_held_out


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "shards")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twelve rows of four places, whose images are in another folder."""
    (tmp_path / "lists").mkdir()
    (tmp_path / "images").mkdir()
    path = tmp_path / "lists" / "photos.jsonl"
    lines = [
        (
            f'{{"id":"k{i}",  "image": "{i}.png", "caption": "{"Pp"[i % 2]}icture {i % 5}!", '
            f'"place": "p{i % 4}"}}'
        )
        for i in range(12)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def content(source: Source) -> dict[str, tuple[bytes, tuple]]:
    samples = [source[number] for number in range(len(source))]
    return {sample.key: (sample.read_image(), sample.captions) for sample in samples}


def read(path: Path, **more: str) -> Source:
    return open_source(SourceConfig(path=str(path), **more))


def test_tars_are_copied_whole_to_two_sides(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "split"
    words = [str(shards), "--output", str(output), "--validation", "0.25"]
    assert run("data split", [*words, "--dry-run"]) == 0
    counts = capsys.readouterr().out.splitlines()[:2]
    assert not output.exists()
    assert not list(tmp_path.glob(".split*"))
    assert run("data split", words) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[:2] == counts
    assert f"llm2clip train-tower {output}/train --validation {output}/valid" in said
    before, train, held_out = (
        content(read(path))
        for path in (shards, output / "train", output / "validation")
    )
    assert train | held_out == before
    assert not train.keys() & held_out.keys()
    assert held_out.keys() == {key for key in before if hash_of(key) < 0.25 * 2**64}
    assert 4 < len(held_out) < 24
    assert f"validation: {len(held_out)} samples ({len(held_out) / 48:.2%})" in said
    summary = json.loads((output / "split.json").read_text())
    assert summary["samples"] == {"train": len(train), "validation": len(held_out)}
    assert run("data split", words) == 2  # nothing is replaced
    assert run("data split", [*words, "--overwrite"]) == 0


def test_a_side_depends_on_the_key_alone(shards: Path, tmp_path: Path):
    def held_out(source: Source) -> set[str]:
        held_out_N = is_held_out(decide(source, 0.3, ""), 0.3)
        return {source.key(number) for number in held_out_N.nonzero()[0].tolist()}

    first = held_out(read(shards))
    # another order, and other names
    shutil.move(shards / "00000.tar", shards / "z.tar")
    assert held_out(read(shards)) == first
    (shards / "z.tar").unlink()
    assert held_out(read(shards)) == {key for key in first if key.startswith("1-")}


def test_groups_stay_together_and_rows_stay_as_they_are(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "split"
    images = ["--image-folder", str(tmp_path / "images")]
    assert (
        run(
            "data split",
            [
                str(rows),
                "--output",
                str(output),
                "--validation",
                "0.4",
                "--by",
                "place",
                *images,
            ],
        )
        == 0
    )
    said = capsys.readouterr().out
    lines = {
        side: (output / f"{side}.jsonl").read_text().splitlines() for side in SIDES
    }
    places = {}
    for side, rows_of_side in lines.items():
        places[side] = {json.loads(line)["place"] for line in rows_of_side}
    assert places["train"] | places["validation"] == {"p0", "p1", "p2", "p3"}
    assert not places["train"] & places["validation"]
    # byte by byte
    assert sorted(lines["train"] + lines["validation"]) == sorted(
        rows.read_text().splitlines()
    )
    assert (
        f"--validation {output}/validation.jsonl --image-folder {tmp_path}/images"
        in said
    )
    assert f"{len(places['validation'])} values of 'place'" in said


def test_llava_s_list_stays_a_list(tmp_path: Path):
    said = [
        [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"a {i}"}]
        for i in range(30)
    ]
    items = [
        {"id": str(i), "image": f"{i}.jpg", "conversations": talk}
        for i, talk in enumerate(said)
    ]
    (tmp_path / "blip.json").write_text(json.dumps(items))
    assert (
        run(
            "data split",
            [
                str(tmp_path / "blip.json"),
                "--output",
                str(tmp_path / "s"),
                "--validation",
                "0.2",
            ],
        )
        == 0
    )
    both = [json.loads((tmp_path / "s" / f"{side}.json").read_text()) for side in SIDES]
    assert (
        sorted(
            (item for side in both for item in side), key=lambda item: int(item["id"])
        )
        == items
    )
    assert all(both)


def test_what_belongs_to_a_sample_goes_with_it(shards: Path, tmp_path: Path):
    """Members that are no image, .txt or .json, and long names."""
    long = "x" * 150
    names = [f"{long}.txt", f"{long}.cls", "0-x.txt", "0-x.cls"]
    write_tar(shards / "more.tar", [(name, b"text") for name in names])
    assert (
        run(
            "data split",
            [str(shards), "--output", str(tmp_path / "s"), "--validation", "0.5"],
        )
        == 0
    )
    split = [
        tarfile.open(path).getnames() for path in (tmp_path / "s").rglob("more.tar")
    ]
    assert sorted(
        name for names_of_split in split for name in names_of_split
    ) == sorted(names)
