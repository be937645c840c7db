"""A revision behind a Hub id: ``owner/name@revision``."""

from pathlib import Path

import pytest
from tiny_hub import cached_repository
from tiny_llm import save_tiny_llm

from llm2clip_plugin.data.check import load_counter
from llm2clip_plugin.hub import can_only_be_a_path
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.vision.directory import fetch_directory

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BRANCHES = ("main", "v1", "refs/pr/1")


@pytest.mark.parametrize("revision", ["", "@v1", "@refs/pr/1", f"@{COMMIT}"])
def test_a_folder_of_the_hub(
    revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = save_tiny_llm(tmp_path / "llm", "llama")
    cached_repository(tmp_path, monkeypatch, "someone/some", llm, COMMIT, BRANCHES)
    name = f"someone/some{revision}"
    assert not can_only_be_a_path(name)
    assert fetch_directory(name).name == COMMIT
    assert load_counter(name, False)("two words") > 0


def test_a_revision_that_the_hub_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_repository(tmp_path, monkeypatch, "someone/some", tmp_path, COMMIT, BRANCHES)
    with pytest.raises(FileNotFoundError, match="someone/some@v2 is not a directory"):
        fetch_directory("someone/some@v2")


def test_an_llm_has_an_option_for_its_revision(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--llm someone/some --revision v1$"):
        EncoderConfig(llm="someone/some@v1")
    EncoderConfig(llm=str(tmp_path / "moved@v1"))  # a path
