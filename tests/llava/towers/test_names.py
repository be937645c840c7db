"""What a tower's name means: exact words, the environment, the registry, the Hub."""

import json

import pytest

from llava_integration import towers as commands
from llava_integration import towers as names
from llava_integration import towers as registry
from llava_integration.towers import TowerNotFoundError
from llm2clip_plugin.files import ContractError


def test_exact_match(world, tmp_path, monkeypatch):
    assert names.is_ours("llm2clip") and names.is_ours("llm2clip:x") and names.is_ours(str(world.towers["clip"]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").mkdir()
    for name in ("llm2clipx", "my/llm2clip", "LLM2CLIP", "openai/clip-vit-large-patch14-336", "plain", "", None):
        assert not names.is_ours(name)


def test_environment_before_choice(world, home, monkeypatch):
    assert commands.main_use([str(world.towers["other"])]) == 0
    assert names.locate("llm2clip").directory == world.towers["other"]
    monkeypatch.setenv("LLM2CLIP_TOWER", str(world.towers["clip"]))
    assert names.locate("llm2clip").directory == world.towers["clip"]
    assert names.locate(f"llm2clip:{world.towers['siglip']}").card.family == "siglip"
    assert names.locate(str(world.towers["dinov2"])).card.family == "dinov2"


def test_a_stray_folder_changes_nothing(world, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llm2clip").mkdir()
    (tmp_path / "llm2clip" / "llm2clip.json").write_text("{}")
    monkeypatch.setenv("LLM2CLIP_TOWER", str(world.towers["clip"]))
    assert names.locate("llm2clip").directory == world.towers["clip"]
    monkeypatch.delenv("LLM2CLIP_TOWER")
    with pytest.raises(TowerNotFoundError, match="LLM2CLIP_TOWER"):
        names.locate("llm2clip")


def test_known_names(world, home, tmp_path, capsys):
    commands.main_use([str(world.towers["clip"])])
    commands.main_use([str(world.towers["siglip"]), "--name", "sig"])
    assert names.locate("llm2clip:sig").directory == world.towers["siglip"]
    assert names.locate("llm2clip:clip").directory == world.towers["clip"]
    twin = tmp_path / "clip"
    twin.symlink_to(world.towers["other"])
    assert registry.free_name(str(twin), registry.read()) == "clip-2"
    with pytest.raises(TowerNotFoundError, match=r"registered towers: clip .*, sig "):
        names.locate("llm2clip:nobody")
    capsys.readouterr()
    commands.main_towers([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("  clip: ") and lines[1].startswith("* sig: ")
    assert "width 32, 3 blocks, 28 px, 2 x 2 = 4 patches" in lines[0] and str(world.towers["clip"]) in lines[0]
    commands.main_towers(["--forget", "sig", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["clip"] and rows[0]["card"]["hidden_size"] == 32
    assert registry.read().chosen == ""
    with pytest.raises(ValueError, match="registered towers: clip"):
        registry.forget("sig")


def test_no_tower_directory(home, tmp_path):
    with pytest.raises(ContractError, match=r"llm2clip import .* --output DIR"):
        names.locate(f"llm2clip:{tmp_path}")
    with pytest.raises(TowerNotFoundError, match="'/nowhere' is not a directory, a registered name or a Hub id"):
        names.locate("llm2clip:/nowhere")


def test_hub_unreachable(home, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TowerNotFoundError, match=r"downloading it from the Hub failed .*pass llm2clip:PATH"):
        names.locate("llm2clip:someone/some-tower")


def test_hub_tower_with_revision(world, home, tmp_path, monkeypatch):
    """The Hub's local cache, laid out as the client writes it, serves a tower by branch and by commit."""
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub"
    repository = cache / "models--someone--some-tower"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / commit).symlink_to(world.towers["clip"])
    (repository / "refs").mkdir()
    for branch in ("main", "v1"):
        (repository / "refs" / branch).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    wanted = names.locate(str(world.towers["clip"])).card.weights_sha256
    for spec in ("someone/some-tower", "someone/some-tower@v1", f"someone/some-tower@{commit}"):
        location = names.locate(f"llm2clip:{spec}")
        assert location.sha256 == wanted and location.origin == spec
    with pytest.raises(TowerNotFoundError):
        names.locate("llm2clip:someone/some-tower@v2")
