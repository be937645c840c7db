"""The command table: quick help, clear errors, no torch for a question about usage."""

import subprocess
import sys

import pytest

from llm2clip_plugin import cli


def test_help_and_import_load_no_torch() -> None:
    code = "import sys, llm2clip_plugin.cli as c; c.main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert name in done.stdout


def test_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian-tower"]) == 2
    assert "unknown command 'trian-tower'; known: doctor, data check" in capsys.readouterr().err


def test_half_a_command_lists_its_other_halves(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "chekc"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'data chekc'; known: data check\n"


def test_what_the_machine_refuses_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    assert cli.main(["train-tower", "--config", str(tmp_path / "no"), "--recipe", ""]) == 2
    (tmp_path / "folder.jsonl").mkdir()
    assert cli.main(["data", "check", str(tmp_path / "folder.jsonl"), "--format", "jsonl"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["embed", "https://host/a.tar", "--llm", "x"], "say where the cache goes with --cache DIR"),
        (["embed", "/data", "--llm", "x", "--dtype", "fp8"], "unknown cache dtype 'fp8'; known: float16, int8"),
        (["train-tower", "--data.path", "https://host/a.tar"], "--data.cache DIR"),
    ],
)
def test_what_cannot_work_is_said_before_it_costs_anything(
    capsys: pytest.CaptureFixture[str], argv: list[str], told: str
) -> None:
    try:
        status = cli.main(argv)
    except SystemExit as ended:  # tyro's own
        status = ended.code
    out = " ".join("".join(capsys.readouterr()).replace("\u2502", " ").split())
    assert status == 2 and told in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*name.split(), "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "usage" in out.lower() and len(out) > 200


def test_what_a_user_can_mend_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    assert cli.main(["import", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "nowhere" in err


def test_doctor_reports_and_mends(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--environment", "train", "--captions", "1", "--width", "8"])
    out = capsys.readouterr().out
    assert status in (0, 1)
    for subject in ("python", "torch", "deepspeed launcher", "C++ compiler", "accelerator", "threads", "port", "disk"):
        assert subject in out


def test_doctor_says_what_a_too_small_disk_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--environment", "train", "--captions", str(10**12)]) == 1
    assert "--dtype int8" in capsys.readouterr().out
