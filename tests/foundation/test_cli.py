"""The command table: quick help, clear errors, no torch for a question about usage."""

import os
import subprocess
import sys

import pytest

from llm2clip_plugin import cli, doctor


def test_help_loads_no_torch() -> None:
    code = (
        "import sys, llm2clip_plugin.cli as c; c.main(['--help'])\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert name in done.stdout


def test_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian-tower"]) == 2
    assert (
        "unknown command 'trian-tower'; did you mean 'train-tower'? known: doctor, run, data make, data check"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*name.split(), "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("example:\n  llm2clip ") and f"\nusage: llm2clip {name} " in out
    assert sum(line.startswith("  -") for line in out.splitlines()) <= 14, "the others belong to --help-all"


def test_user_errors_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    assert cli.main(["import", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "nowhere" in err


def test_doctor_reports_problems_and_fixes(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--environment", "train", "--captions", "1", "--width", "8"])
    out = capsys.readouterr().out
    assert status in (0, 1)
    for subject in ("python", "torch", "deepspeed launcher", "C++ compiler", "accelerator", "threads", "port", "disk"):
        assert subject in out


def test_doctor_says_what_a_too_small_disk_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--environment", "train", "--captions", str(10**12)]) == 1
    assert "--dtype int8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("told", "state"),
    [
        ("g++ (Debian 12.2.0-14) 12.2.0\nCopyright", "ok"),
        ("g++ (Ubuntu 9.4.0-1ubuntu1~20.04.2) 9.4.0", "warn"),
        ("g++ (GCC) 8.5.0 20210514 (Red Hat 8.5.0-4)", "fail"),
        ("c++ (GCC) 4.8.5 20150623", "fail"),
        ("Debian clang version 14.0.6", "ok"),
        ("Apple clang version 15.0.0 (clang-1500.3.9.4)", "ok"),
        ("clang version 9.0.1-12", "fail"),
        ("icpx 2024", "warn"),
        ("", "warn"),
    ],
)
def test_doctor_judges_compilers(told: str, state: str) -> None:
    finding = doctor.judge_compiler(told)
    assert (finding.subject, finding.state) == ("C++ compiler", state)
    assert bool(finding.fix) is (state != "ok")


def test_doctor_finds_a_compiler_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = doctor.check_compiler()
    assert finding.state == "fail" and "CXX" in finding.fix
    old = tmp_path / "old-c++"
    old.write_text("#!/bin/sh\necho 'g++ (GCC) 7.3.0'\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    (finding,) = doctor.check_compiler()
    assert finding.state == "fail" and "g++ 7 lacks C++17" in finding.fix


def test_ranks_of_one_machine_share_its_cores(tmp_path) -> None:
    """Under a launcher a command takes one thread a rank, unless the user has said how many."""
    code = "import os, llm2clip_plugin.cli as c; c.run('doctor', ['--json']); print(os.environ['OMP_NUM_THREADS'])"
    for given, threads in (({}, "1"), ({"OMP_NUM_THREADS": "3"}, "3")):
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        env |= {"WORLD_SIZE": "2", "RANK": "0", **given}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.split()[-1] == threads
