"""llm2clip run: which files are hashed again."""

from pathlib import Path

import pytest

from llm2clip_plugin.stages import digests
from llm2clip_plugin.stages.digests import Artifact, Digests


def digest(folder: Path) -> str:
    """Of the file ``data``, at a new start."""
    digests = Digests(folder)
    record = digests.of(
        Artifact(name="the data", files=lambda: {"data": str(folder / "data")})
    )
    digests.save()
    return record["sha256"]


def test_a_file_of_the_same_size_is_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(digests, "SETTLED", 0)  # as if the file had been there for long
    (tmp_path / "data").write_text("one")
    first = digest(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(digests, "_hash", pytest.fail)
        assert digest(tmp_path) == first
    (tmp_path / "data").write_text("two")
    assert digest(tmp_path) != first


def test_a_file_that_was_just_written_is_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It may change once more before the clock of the file system moves on."""
    (tmp_path / "data").write_text("one")
    stamp = digests._stamp(str(tmp_path / "data"))
    monkeypatch.setattr(digests, "_stamp", lambda path: stamp)
    first = digest(tmp_path)
    (tmp_path / "data").write_text("two")
    assert digest(tmp_path) != first
