"""What a tower's name means: exact words, the environment, the registry, the Hub."""

import errno
import json
import multiprocessing
import shutil

import pytest
from tiny_hub import cached_repository

from llava_integration.plug import towers
from llava_integration.plug.towers import TowerNotFoundError
from llm2clip_plugin.cli import main
from llm2clip_plugin.errors import ContractError


def test_exact_match(world, tmp_path, monkeypatch):
    assert towers.is_ours("llm2clip")
    assert towers.is_ours("llm2clip:x")
    assert towers.is_ours(str(world.towers["clip"]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").mkdir()
    for name in (
        "llm2clipx",
        "my/llm2clip",
        "LLM2CLIP",
        "openai/clip-vit-large-patch14-336",
        "plain",
        "",
        None,
    ):
        assert not towers.is_ours(name)


def test_environment_before_choice(world, home, monkeypatch):
    assert towers.main_use([str(world.towers["other"])]) == 0
    assert towers.locate("llm2clip").directory == world.towers["other"]
    monkeypatch.setenv("LLM2CLIP_TOWER", str(world.towers["clip"]))
    assert towers.locate("llm2clip").directory == world.towers["clip"]
    assert towers.locate(f"llm2clip:{world.towers['siglip']}").card.family == "siglip"
    assert towers.locate(str(world.towers["dinov2"])).card.family == "dinov2"


def test_known_names(world, home, tmp_path, capsys):
    towers.main_use([str(world.towers["clip"])])
    towers.main_use([str(world.towers["siglip"]), "--name", "sig"])
    assert towers.locate("llm2clip:sig").directory == world.towers["siglip"]
    assert towers.locate("llm2clip:clip").directory == world.towers["clip"]
    with pytest.raises(TowerNotFoundError, match=r"registered towers: clip .*, sig "):
        towers.locate("llm2clip:nobody")
    capsys.readouterr()
    towers.main_towers([])
    row, chosen = capsys.readouterr().out.splitlines()
    assert row.startswith(f"  clip: {world.towers['clip']}, sha256 ")
    assert "width 32" in row
    assert chosen.startswith("* sig: ")
    assert towers.select("/elsewhere/clip", "0" * 64) == "clip-2"


@pytest.mark.both_stacks
def test_towers_that_are_registered_at_once(home):
    """By 12 processes, as of jobs that start together."""
    context = multiprocessing.get_context("fork")
    processes = []
    for number in range(12):
        tower = (f"/towers/{number}", f"{number:064}")
        processes.append(context.Process(target=towers.select, args=tower))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(towers.registry().towers) == 12


@pytest.mark.both_stacks
def test_a_file_system_without_locks(home, monkeypatch):
    def acquire(self, timeout):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    assert towers.select("/towers/one", "0" * 64) == "one"
    assert towers.registry().chosen == "one"


def test_a_name_means_the_tower_that_was_registered(world, home, tmp_path, capsys):
    """Not one that is at its place later, as after a training that was repeated in its folder."""
    place = tmp_path / "tower"
    shutil.copytree(world.towers["clip"], place)
    for name in ("before", "same"):
        assert main(["use", str(place), "--name", name]) == 0
    assert main(["use", "before"]) == 0
    assert towers.registry().chosen == "before"
    shutil.rmtree(place)
    shutil.copytree(world.towers["other"], place)
    assert main(["use", str(place), "--name", "after"]) == 0
    assert towers.locate("llm2clip").directory == place
    capsys.readouterr()
    assert main(["use", "before"]) == 2
    assert f"`llm2clip use {place} --name before`" in capsys.readouterr().err
    with pytest.raises(ContractError, match="registered as 'same' had"):
        towers.locate("llm2clip:same")
    assert main(["towers"]) == 0
    after, before, _ = capsys.readouterr().out.splitlines()
    assert after.startswith(f"* after: {place}, sha256 ")
    assert before.startswith("  before: not usable: before: the tower at ")
    shutil.rmtree(place)
    shutil.copytree(world.towers["siglip"], place)
    with pytest.raises(ContractError, match="`llm2clip use after`: the tower at"):
        towers.locate("llm2clip")
    assert main(["use", str(place)]) == 0
    assert towers.locate("llm2clip").card.family == "siglip"


ENTRY = {"spec": "/towers/a", "weights_sha256": "0"}
DAMAGE = {
    "is not one of its towers (a)": {"chosen": "b", "towers": {"a": ENTRY}},
    "towers.a has ['weights_sha256'], expected a spec": {
        "towers": {"a": {"weights_sha256": "0"}}
    },
    "towers.a has ['spec'], expected a spec": {"towers": {"a": {"spec": "/towers/a"}}},
    "towers.a leads back to itself": {
        "towers": {"a": ENTRY | {"spec": "b"}, "b": ENTRY | {"spec": "a"}}
    },
    "towers.a.spec is 5, expected str": {"towers": {"a": ENTRY | {"spec": 5}}},
    "towers is [], expected dict": {"towers": []},
    "is not valid JSON": None,
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_registry_is_one_line(home, message, capsys):
    body = DAMAGE[message]
    text = (
        "{"
        if body is None
        else json.dumps({"kind": "llm2clip-towers", "format_version": 1, **body})
    )
    towers.registry_file().parent.mkdir(parents=True, exist_ok=True)
    towers.registry_file().write_text(text)
    for words in (["towers"], ["use", "a"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
        assert str(towers.registry_file()) in error


def test_hub_tower_with_revision(world, home, tmp_path, monkeypatch):
    """The Hub's local cache, laid out as the client writes it, serves a tower by branch and by
    commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached_repository(
        tmp_path,
        monkeypatch,
        "someone/some-tower",
        world.towers["clip"],
        commit,
        ("main", "v1"),
    )
    wanted = towers.locate(str(world.towers["clip"])).card.weights_sha256
    for spec in (
        "someone/some-tower",
        "someone/some-tower@v1",
        f"someone/some-tower@{commit}",
    ):
        location = towers.locate(f"llm2clip:{spec}")
        assert location.sha256 == wanted
        assert location.origin == spec
    with pytest.raises(TowerNotFoundError):
        towers.locate("llm2clip:someone/some-tower@v2")
