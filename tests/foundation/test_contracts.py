"""Records survive a round trip and refuse what they are not; outputs appear whole or not at all."""

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_data import made_up

from llm2clip_plugin.atomic import atomic_directory, atomic_file
from llm2clip_plugin.contracts import TeacherIdentity, TowerCard
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hashes import sha256_weights


def card() -> TowerCard:
    sizes = {"hidden_size": 32, "num_layers": 2, "patch_size": 14, "image_size": 56}
    return TowerCard(
        family="clip", origin="a/b", has_cls=True, weights_sha256="0" * 64, **sizes
    )


def teacher(llm: str = "x/y", prompt: str = "") -> TeacherIdentity:
    return dataclasses.replace(made_up(), llm=llm, prompt=prompt)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "llm2clip-scores"}, "expected a 'llm2clip-tower'"),
        ({"format_version": 2}, "format version 2, but this release reads 1"),
        ({"colour": "blue"}, r"unknown fields \['colour'\]"),
        ({"family": None}, "is missing the required fields"),
    ],
)
def test_refusals_name_file_and_field(
    tmp_path: Path, change: dict, message: str
) -> None:
    body = json.loads(card().to_json())
    body.update(change)
    body = {key: value for key, value in body.items() if value is not None}
    (tmp_path / "card.json").write_text(json.dumps(body))
    with pytest.raises(ContractError, match=message) as caught:
        TowerCard.read(tmp_path / "card.json")
    assert "card.json" in str(caught.value)


def test_fingerprint_is_what_changes_an_embedding() -> None:
    assert teacher(llm="x/y").fingerprint == teacher(llm="/other/folder").fingerprint
    assert teacher().fingerprint != teacher(prompt="Describe: ").fingerprint


def test_atomic_file_leaves_the_old_one_when_writing_fails(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_directory(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(FileExistsError, match="--overwrite"), atomic_directory(target):
        pass
    with atomic_directory(target, replace=True) as temporary:
        (temporary / "b").write_text("2")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("existing", ["nothing", "an empty folder", "an old result"])
def test_of_two_that_write_a_directory_at_once_the_second_is_refused(
    tmp_path: Path, existing: str
) -> None:
    target = tmp_path / "out"
    replace = existing == "an old result"
    if existing != "nothing":
        target.mkdir()
    if replace:
        (target / "old").write_text("0")
    second = atomic_directory(target, replace=replace)
    with pytest.raises(FileExistsError, match="by another process"), second as folder:
        (folder / "b").write_text("2")
        with atomic_directory(target, replace=replace) as first:
            (first / "a").write_text("1")
    assert [path.name for path in target.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [target]


def test_weights_hash_ignores_order_and_metadata(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    first = torch.arange(6.0)
    second = torch.ones(2, 3)
    save_file({"a": first, "b": second}, tmp_path / "1.safetensors")
    save_file(
        {"b": second, "a": first}, tmp_path / "2.safetensors", metadata={"format": "pt"}
    )
    save_file({"a": first, "b": second + 1}, tmp_path / "3.safetensors")
    hashes = [sha256_weights(tmp_path / f"{i}.safetensors") for i in (1, 2, 3)]
    assert hashes[0] == hashes[1] != hashes[2]
    whole = (tmp_path / "1.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ContractError, match="not a complete safetensors file"):
        sha256_weights(tmp_path / "cut.safetensors")
