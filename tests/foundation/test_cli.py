"""The command table: quick help, clear errors, no torch for a question about usage."""

import os
import subprocess
import sys
from pathlib import Path

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


def test_the_nearest_command_is_suggested_if_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    for words, hint in ((["evalute", "zeroshot"], "did you mean 'evaluate'"), (["xyz"], None)):
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert hint in error if hint else "did you mean" not in error


def test_half_a_command_lists_its_other_halves(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "chekc"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: unknown command 'data chekc'; did you mean 'data check'? known: data make, ")


def test_the_help_of_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["data", "--help"], ["data"], ["llava", "-h"]):
        assert cli.main(words) == 0
        out = capsys.readouterr().out
        assert f"\n  {words[0]} " in out and "train-tower" not in out


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("train-tower x --recipe openai_l14_36", "unknown recipe 'openai_l14_36'; did you mean 'openai_l14_336'?"),
        ("train-tower x --precision bf61", "--precision: invalid choice: 'bf61' (choose from 'fp32', 'bf16', 'fp16')"),
        ("data check x --format jsnl", "unknown data format 'jsnl'; did you mean 'jsonl'?"),
        ("evaluate t d --sutie flickr30k", "unknown option --sutie; did you mean --suite?"),
        ("evaluate t d --suite flickr30", "unknown suite 'flickr30'; did you mean 'flickr30k'?"),
        ("export x --output y --format clp", "unknown --format 'clp'; did you mean 'clip'?"),
        ("score popee d --answers a", "unknown benchmark 'popee'; did you mean 'pope'?"),
    ],
)
def test_the_nearest_name_is_suggested(
    line: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "d").mkdir()
    assert cli.main(line.split()) == 2 and hint in capsys.readouterr().err


def test_what_the_machine_refuses_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    assert cli.main(["train-tower", "--config", str(tmp_path / "no"), "--recipe", ""]) == 2
    (tmp_path / "folder.jsonl").mkdir()
    assert cli.main(["data", "check", str(tmp_path / "folder.jsonl"), "--format", "jsonl"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["embed", "https://host/a.tar", "--llm", "x"], "is not a local folder; set --cache DIR"),
        (["embed", ".", "--llm", "x", "--dtype", "fp8"], "unknown cache dtype 'fp8'; known: float16, int8"),
        (["train-tower", "https://host/a.tar", "--tower", "x"], "--cache DIR"),
    ],
)
def test_unusable_settings_are_refused_before_loading(
    capsys: pytest.CaptureFixture[str], argv: list[str], told: str
) -> None:
    assert cli.main(argv) == 2
    assert told in capsys.readouterr().err


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


def test_doctor_says_what_too_small_a_shared_memory_needs() -> None:
    (finding,) = doctor.check_shared_memory(10**9)
    assert finding.state == "warn" and "--ipc=host or --shm-size=" in finding.fix
    (finding,) = doctor.check_shared_memory(1)
    assert finding.subject == "shared memory" and "1 ranks with loader processes need 256 MB" in finding.found


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


@pytest.mark.parametrize(
    ("threads", "ranks", "state"),
    [(None, 2, "warn"), (None, 1, "ok"), ("1", 2, "ok"), ("4096", 1, "warn"), ("4096", 2, "warn"), ("1", 4096, "ok")],
)
def test_doctor_judges_threads(threads: str | None, ranks: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    (finding,) = doctor.check_threads(ranks)
    assert finding.state == state and ("OMP_NUM_THREADS=" in finding.fix) is (state == "warn")


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
