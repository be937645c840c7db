"""--overwrite replaces what the command wrote, known by its records, and nothing else."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_data import make_shards, write_tar

from llm2clip_plugin.cli import main
from llm2clip_plugin.folders import (
    KINDS,
    LLAVA_FOLDER,
    MAKE_FOLDER,
    MODEL_FOLDER,
    SPLIT_FOLDER,
    FolderKind,
    output_folder,
)


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def names_in(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir()
    }


def write(folder: Path, kind: FolderKind, *names: str) -> None:
    with output_folder(folder, kind, replace=True) as temporary:
        put(temporary, *names)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_foreign_folder_stays(kind: FolderKind, tmp_path: Path) -> None:
    put(tmp_path / "out", "thesis.tex")
    with pytest.raises(FileExistsError, match="it has thesis"):
        write(tmp_path / "out", kind)
    assert names_in(tmp_path) == {"out/thesis.tex"}


@pytest.mark.parametrize(
    "kind, ours",
    [
        (MAKE_FOLDER, ["00000.tar", "left-out.jsonl"]),
        (SPLIT_FOLDER, ["split.json", "train/a.tar", "validation/a.tar"]),
        (LLAVA_FOLDER, ["captions.json", "images/00000000.png"]),
        (
            MODEL_FOLDER,
            [
                "llm2clip.json",
                "model.safetensors",
                "teacher-adapter/adapter_config.json",
                "README.md",
            ],
        ),
    ],
)
@pytest.mark.parametrize(
    "stranger",
    ["thesis.tex", "train/mine.tar", "notes/a.txt", "00007.tar", "scores.json"],
)
def test_a_stranger_in_our_folder_stays(
    kind: FolderKind, ours: list[str], stranger: str, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    write(folder, kind, *ours)
    write(folder, kind, *ours)  # the folder is ours
    put(
        folder, stranger, ".DS_Store", ".llm2clip/lock", "embeddings-0123/manifest.json"
    )
    before = names_in(tmp_path)
    with pytest.raises(FileExistsError, match=f"has {stranger}, not written by"):
        write(folder, kind, *ours)
    assert names_in(tmp_path) == before
    (folder / stranger).unlink()
    write(folder, kind, *ours[:1])
    assert ours[0] in names_in(folder) <= {ours[0], "llm2clip-folder.json"}


def test_folders_of_earlier_releases_are_known(tmp_path: Path) -> None:
    put(tmp_path / "made", "left-out.jsonl", "00000.tar")
    put(tmp_path / "split", "split.json", "train/x/a.tar", "validation.jsonl")
    put(
        tmp_path / "vlm",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "modeling_llava_tower.py",
    )
    (tmp_path / "vlm" / "config.json").write_text(json.dumps({"llm2clip_vlm": {}}))
    for name, kind in {
        "made": MAKE_FOLDER,
        "split": SPLIT_FOLDER,
        "vlm": MODEL_FOLDER,
    }.items():
        write(tmp_path / name, kind, "new")
        assert "new" in names_in(tmp_path / name)


def test_another_command_s_folder_stays(tmp_path: Path) -> None:
    write(tmp_path / "out", MAKE_FOLDER, "00000.tar")
    with pytest.raises(
        FileExistsError, match="not written by `llm2clip data split`: it has 00000"
    ):
        write(tmp_path / "out", SPLIT_FOLDER, "split.json")


def test_a_link_is_followed_and_links_inside_are_strangers(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "out", MAKE_FOLDER, "00000.tar")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    write(tmp_path / "out", MAKE_FOLDER, "00001.tar")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "out" / "00001.tar").is_file()
    assert os.listdir(tmp_path / "disk") == ["out"]
    put(tmp_path / "photos", "a.png")
    (tmp_path / "out" / "photos").symlink_to(tmp_path / "photos")
    with pytest.raises(FileExistsError, match="has photos, not written by"):
        write(tmp_path / "out", MAKE_FOLDER, "00002.tar")
    with pytest.raises(FileExistsError, match="is a file, expected a folder"):
        write(tmp_path / "photos" / "a.png", MAKE_FOLDER, "00002.tar")


def make(data: Path, output: Path) -> list[str]:
    return ["data", "make", str(data.parent / "table.csv"), "--output", str(output)]


def split(data: Path, output: Path) -> list[str]:
    return ["data", "split", str(data), "--output", str(output), "--validation", "0.3"]


def llava(data: Path, output: Path) -> list[str]:
    return ["llava", "data", str(data), "--output", str(output)]


@pytest.mark.parametrize("words", [make, split, llava])
def test_commands_write_the_record(
    words: Callable[[Path, Path], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = make_shards(tmp_path / "data")
    output = tmp_path / "out"
    write_tar(tmp_path / "more.tar", [])
    (tmp_path / "table.csv").write_text("image,caption\nmissing.png,a\npicture.png,b\n")
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    again = [*words(data, output), "--overwrite"]
    put(output, "thesis.tex")
    assert main(again) == 2
    assert names_in(output) == {"thesis.tex"}
    (output / "thesis.tex").unlink()
    assert main(again) == main(again) == 0
    record = json.loads((output / "llm2clip-folder.json").read_text())
    assert {*record["files"], "llm2clip-folder.json"} == names_in(output)
    assert main(
        ["data", "check", str(output / "train" if words is split else output)]
    ) == (2 if words is llava else 0)
    put(output, "thesis.tex")
    capsys.readouterr()
    assert main(again) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {output} has thesis.tex, not written by")
    assert "move it" in message


def test_a_cache_goes_with_its_data_and_what_else_is_in_it_stays(
    tmp_path: Path,
) -> None:
    write(tmp_path / "out", MAKE_FOLDER, "00000.tar")
    put(
        tmp_path / "out",
        "embeddings-0123/manifest.json",
        "embeddings-0123/part/00.safetensors",
    )
    put(tmp_path / "out", "embeddings-0123/thesis.tex")
    with pytest.raises(
        FileExistsError, match=r"has embeddings-0123/thesis\.tex, not written by"
    ):
        write(tmp_path / "out", MAKE_FOLDER, "00001.tar")
    (tmp_path / "out" / "embeddings-0123" / "thesis.tex").unlink()
    write(tmp_path / "out", MAKE_FOLDER, "00001.tar")
    assert names_in(tmp_path / "out") == {"00001.tar", "llm2clip-folder.json"}
