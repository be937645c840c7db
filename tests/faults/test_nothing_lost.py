"""A typo, a smaller data set or a wrong output never replaces what a longer run has made."""

import json
from pathlib import Path

import pytest
from planted_faults import Fault, World, contents, copied, meet, rows
from tiny_data import make_shards, write_tar
from tiny_llm import save_tiny_llm

from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import CacheManifest

TEXTS = [{"caption": f"short {i}", "long_caption": f"a long one {i}"} for i in range(8)]
LINES = [{"id": f"k{i}", "image": "x.png", **texts} for i, texts in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars and rows with their complete caches, and the LLM of these."""
    world = World(tmp_path_factory.mktemp("embedded") / "w")
    make_shards(world.path("data"))
    world.path("rows").mkdir()
    world.path("rows/pairs.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in LINES)
    )
    save_tiny_llm(world.path("llm"), "llama")
    for data in ("data", "rows/pairs.jsonl"):
        assert (
            main(["embed", str(world.path(data)), "--llm", str(world.path("llm"))]) == 0
        )
    return world.folder


@pytest.fixture
def complete(embedded: Path, tmp_path: Path) -> World:
    return copied(embedded, tmp_path / "w")


def fewer_samples(world: World) -> None:
    path = world.path("rows/pairs.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))


@rows(
    Fault(
        "field with a typo",
        "data --fields captoin=short",
        "... 'captoin' ...; known: caption, ...",
    ),
    Fault(
        "one of two fields",
        "data --fields caption=short",
        "{w}/data/embeddings-.../00000...48 ...24 ...",
    ),
    Fault(
        "rows removed",
        "rows/pairs.jsonl",
        "...-... 16 captions; ... gives 10 ...--overwrite`, or delete ...",
        fewer_samples,
    ),
    Fault(
        "shards of another data set",
        "other --cache {cache}",
        "...48 captions; ...",
        lambda w: other_captions(w),
    ),
)
def test_embed(
    fault: Fault, complete: World, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(complete.folder / "data"), contents(complete.folder / "rows")
    data, *options = fault.words.replace(
        "{cache}", str(next(complete.path("data").glob("embeddings-*")))
    ).split()
    command = [
        "embed",
        str(complete.path(data)),
        "--llm",
        str(complete.path("llm")),
        *options,
    ]
    meet(fault, complete, command, capsys)
    after = contents(complete.folder / "data"), contents(complete.folder / "rows")
    for old, new in zip(before, after, strict=True):
        old_caches = {name: body for name, body in old.items() if "embeddings-" in name}
        assert old_caches == {
            name: body for name, body in new.items() if "embeddings-" in name
        }


def other_captions(world: World) -> None:
    """Tars of the same names with other captions of the same number."""
    for shard in ("00000", "00001"):
        captions = [
            json.dumps({"caption": f"something else {shard} {number}"}).encode()
            for number in range(48)
        ]
        write_tar(
            world.path(f"other/{shard}.tar"),
            [(f"x{number}.json", body) for number, body in enumerate(captions)],
        )


def test_embed_replaces_with_overwrite_and_grows_without(complete: World) -> None:
    data = str(complete.path("data"))
    llm = str(complete.path("llm"))
    manifest = complete.cache / CacheManifest.FILE
    assert CacheManifest.read(manifest).captions == 96
    assert (
        main(["embed", data, "--llm", llm, "--fields", "caption=short", "--overwrite"])
        == 0
    )
    assert CacheManifest.read(manifest).captions == 48
    assert main(["embed", data, "--llm", llm]) == 0
    assert CacheManifest.read(manifest).captions == 96


def test_a_split_inside_its_data(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"{world.folder}/data/held-out"
    fault = Fault("", "", f"--output {output} is inside the data, ...")
    meet(
        fault,
        world,
        [
            "data",
            "split",
            str(world.path("data")),
            "--output",
            output,
            "--validation",
            "0.3",
        ],
        capsys,
    )
    assert not list(world.path("data").rglob("split.json"))
