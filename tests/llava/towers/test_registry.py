"""towers.json: several processes change it at once, it is damaged, a name is empty."""

import json
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from llava_integration import towers as commands
from llava_integration import towers as names
from llava_integration import towers as registry
from llava_integration.towers import TowerNotFoundError
from llm2clip_plugin import cli
from llm2clip_plugin.files import ContractError

SELECT = """
import sys
from llava_integration.towers import registry
for number in range(4):
    registry.select(f"/towers/{sys.argv[1]}-{number}", "0" * 64)
"""


def test_six_processes_that_register_towers_at_once_keep_all(home: Path):
    processes = [subprocess.Popen([sys.executable, "-c", SELECT, letter]) for letter in "abcdef"]
    assert [process.wait(120) for process in processes] == [0] * 6
    known = registry.read()
    assert sorted(known.towers) == sorted(f"{letter}-{number}" for letter in "abcdef" for number in range(4))
    assert known.chosen in known.towers
    assert sorted(path.name for path in home.iterdir()) == ["towers.json", "towers.lock"]


def test_a_registry_that_another_process_holds_is_told(home: Path, monkeypatch: pytest.MonkeyPatch):
    registry.select("/towers/a", "0" * 64)
    monkeypatch.setattr(registry, "LOCK_SECONDS", 0.1)
    with filelock.FileLock(home / "towers.lock"), pytest.raises(TimeoutError, match=r"it holds .*towers.lock"):
        registry.select("/towers/b", "0" * 64)
    assert sorted(registry.read().towers) == ["a"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "contains a 'list'"),
        ({"towers": []}, "towers is .*, expected dict"),
        ({"towers": {"a": {"spec": 1}}}, "towers.a.spec is 1, expected str"),
        ({"towers": {"a": {}}}, "tower 'a' has no spec and no weights_sha256"),
        ({"chosen": "b"}, r"chosen is 'b', which is not one of \['a'\]"),
        ({"format_version": 2}, "format version 2"),
    ],
)
def test_a_damaged_registry_says_what_to_do(home: Path, capsys, content, message: str):
    registry.select("/towers/a", "0" * 64)
    file = registry.registry_file()
    body = content if isinstance(content, str) else json.dumps({**json.loads(file.read_text()), **content})
    file.write_text(body)
    with pytest.raises(ContractError, match=rf"{message}.*; correct the file, or delete it and register your towers"):
        registry.read()
    for words in (["towers"], ["towers", "--forget", "a"], ["use", "/nowhere"]):
        assert cli.main(words) == 2
        assert "register your towers again with `llm2clip use`" in capsys.readouterr().err
    assert file.read_text() == body


@pytest.mark.parametrize("name", ["", " "])
def test_a_tower_without_a_name_is_not_the_current_folder(home: Path, tmp_path: Path, monkeypatch, capsys, name: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llm2clip.json").write_text("{}")
    with pytest.raises(
        TowerNotFoundError, match=r"--vision_tower llm2clip: ?: no tower is named; expected a tower dir"
    ):
        names.locate(f"llm2clip:{name}")
    assert cli.main(["use", name]) == 2
    assert "no tower is named" in capsys.readouterr().err


def test_a_name_that_a_terminal_would_obey_is_refused(home: Path):
    for name in ("a\x1b[2J", " a", "a\n"):
        with pytest.raises(ValueError, match="contains control characters, or spaces at an end"):
            registry.select("/towers/a", "0" * 64, name=name)
    assert not registry.read().towers


def test_use_refuses_the_card_of_no_tower(home: Path, tmp_path: Path, capsys):
    (tmp_path / "llm2clip.json").write_text('{"kind": "llm2clip-tower", "format_version": 1, "family": "../../x"}')
    with pytest.raises(ContractError, match="missing the required fields"):
        commands.main_use([str(tmp_path)])
