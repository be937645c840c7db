"""Arguments that are something else than a command takes: one line names the thing; nothing is
written or lost."""

import time
from pathlib import Path

import pytest
from planted_faults import Fault, World, contents, meet, rows

TABLE = (
    (Path(__file__).parent / "wrong_arguments.txt")
    .read_text(encoding="utf-8")
    .splitlines()
)


@rows(*(Fault(*line.split(" | ")) for line in TABLE if not line.startswith("#")))
def test_refused(
    fault: Fault,
    furnished: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(furnished.folder)
    started = time.monotonic()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("LLM2CLIP_HOME", str(tmp_path / "home"))
    output = meet(
        fault,
        furnished,
        fault.words.replace("{w}", str(furnished.folder)).split(),
        capsys,
    )
    assert output.count("error: ") == 1
    assert time.monotonic() < started + 10
    assert contents(furnished.folder) == before
    assert not [*(tmp_path / "here").iterdir()]
