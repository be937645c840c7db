"""Programs that this package starts don't run the modules of the folder that the user works in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_integration.evaluator.benchmarks.bench import (
    COMMAND,
    Task,
    evaluate_command,
    lmms_eval_command,
)
from llava_integration.evaluator.benchmarks.rules import benchmark
from llm2clip_plugin import processes
from llm2clip_plugin.signals import attend
from llm2clip_plugin.stages.rerun import Stage

PLANTED = ("json", "random", "runpy", "torch", "transformers", "llm2clip_plugin")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, whose modules leave a file when they are imported."""
    for name in PLANTED:
        code = (
            f"import os; open({str(tmp_path)!r} + '/ran-' + str(os.getpid()), 'w').close(); "
            f"raise SystemExit(7)"
        )
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(processes.SAFE_PATH, raising=False)
    return tmp_path


def bench(*words: str) -> object:
    return COMMAND.parse([".", "--model-path", "model", "--output", "out", *words])


def commands(gpus: int) -> list[list[str]]:
    """Those of run and bench-mllm, which print their help and end."""
    stage = Stage(
        name="check the data", words=("llm2clip", "data", "check", "--help"), ranks=gpus
    )
    task = Task(benchmark=benchmark("pope"), question_file=Path("questions.jsonl"))
    answer = evaluate_command(
        task, bench("--gpus", str(gpus), "--", "--help"), Path("answers.jsonl")
    )
    return [stage.argv(), answer]


def test_the_modules_are_a_trap(planted: Path):
    words = [sys.executable, "-m", "llm2clip_plugin.cli", "--version"]
    assert subprocess.run(words, check=False).returncode == 7
    assert list(planted.glob("ran-*"))


@pytest.mark.parametrize("version", [(3, 11), (3, 10)])
def test_stages_and_benchmarks_run_no_module_of_the_working_directory(
    planted: Path, monkeypatch, version
):
    """The form for Python 3.10 without the variable, which that version doesn't know."""
    monkeypatch.setattr(processes.sys, "version_info", version)
    for words in commands(1):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "usage: llm2clip" in done.stdout, done.stderr
    assert not list(planted.glob("ran-*"))


def test_ranks_run_no_module_of_the_working_directory(
    planted: Path, capfd: pytest.CaptureFixture[str]
):
    assert attend(commands(2)[0]) == 0
    assert capfd.readouterr().out.count("usage: llm2clip data check") == 2
    assert not list(planted.glob("ran-*"))


def test_pythonpath_is_searched(planted: Path):
    (planted / "own").mkdir()
    (planted / "own" / "mine.py").write_text("print('of PYTHONPATH')")
    path = os.pathsep.join(filter(None, ["own", os.environ.get("PYTHONPATH")]))
    words = processes.python_module("mine")
    environment = processes.child_environment() | {"PYTHONPATH": path}
    assert (
        subprocess.run(words, env=environment, capture_output=True, text=True).stdout
        == "of PYTHONPATH\n"
    )


def test_lmms_eval_is_started_without_them_too():
    several = lmms_eval_command("mmvp", bench("--engine", "lmms-eval", "--gpus", "2"))
    assert several[:2] == [sys.executable, "-P"]
    assert several.count("-P") == 2
    assert "--no_python" in several
