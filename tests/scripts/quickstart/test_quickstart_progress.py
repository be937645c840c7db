"""What the quickstart shows while it works, and that it imports nothing of the working
directory."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HEAD = """
set -euo pipefail
LOGS=logs
. "$ROOT/scripts/quickstart/progress.sh"
trap_ends
plan "the environment" 60
plan "stage 1: fine-tuning" 120
plan "the page" 180
"""


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    # a shell cannot trap a signal that was ignored when it began, as it is where tests run as a job
    # in the background
    command = ["env", "--default-signal=INT", f"ROOT={ROOT}", "bash", "-c", script]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False
    )


def test_every_stage_is_a_line_of_one_form(tmp_path: Path) -> None:
    done = run(tmp_path, HEAD + "stage echo one\nstage echo two\nstage echo three\n")
    lines = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 3, done.stderr
    names = ("the environment", "stage 1: fine-tuning", "the page")
    for number, line in enumerate(lines, 1):
        name = names[number - 1]
        assert re.fullmatch(
            rf"\[{number}/3\] {name} +\d+:\d\d elapsed, .*left", line
        ), line
    assert lines[0].endswith("about 6 min left")  # 60 + 120 + 180 seconds
    # stages that were done before say nothing about the speed
    assert lines[2].endswith("about 3 min left")
    assert done.stdout == ""
    assert (tmp_path / "logs" / "02-stage-1.log").read_text() == "two\n"
    assert not (tmp_path / "logs" / "seconds.tsv").exists()


def test_the_time_left_follows_the_speed_of_this_machine(tmp_path: Path) -> None:
    # the shell's clock stands still, whatever else the machine does
    clock = "unset SECONDS\nSECONDS=0\n"
    slow = "slow() { SECONDS=$((SECONDS + 120)); }\n"
    script = clock + HEAD + slow + "stage slow\nstage true\n"
    done = run(tmp_path, script)
    # twice as long as (120 + 180) seconds
    assert done.stderr.splitlines()[1].endswith("about 10 min left")
    assert (tmp_path / "logs" / "seconds.tsv").read_text() == "120\tthe environment\n"


def test_a_stage_that_fails_shows_its_end_and_where_the_rest_is(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        HEAD
        + (
            'broken() { seq 100; echo "error: no compiler"; false; echo later; }\nstage broken\n'
            "stage true\n"
        ),
    )
    assert done.returncode == 1
    assert "error: no compiler" in done.stderr
    assert "\n1\n" not in done.stderr
    assert "later" not in done.stderr
    assert "'the environment' failed" in done.stderr
    assert "logs/01-the-environment.log" in done.stderr
    assert done.stderr.endswith("Rerun the same command to resume.\n")


def test_ctrl_c_says_how_to_resume(tmp_path: Path) -> None:
    """The signal reaches the script and what it runs, as from a terminal; the stage sends it when
    it has begun."""
    done = run(
        tmp_path,
        HEAD + "interrupted() { kill -INT $$; sleep 60; }\nstage interrupted\n",
    )
    assert done.returncode == 130
    assert (
        done.stderr.splitlines()[-1]
        == "stopped in 'the environment'; rerun the same command to resume"
    )


def test_a_module_is_run_without_the_files_of_the_working_directory(
    tmp_path: Path,
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('foreign code')\n")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "stage.py").write_text(
        "import random, sys\nprint(__name__, *sys.argv[1:])\n"
    )
    stage = f"PYTHONPATH={tmp_path}/lib run_module python3 stage --seed 0"
    script = f'. "$ROOT/scripts/options.sh"; {stage}'
    done = run(tmp_path, script)
    assert done.stdout == "__main__ --seed 0\n", done.stderr


def test_no_script_of_the_quickstart_runs_a_module_by_python_m() -> None:
    scripts = [ROOT / "scripts" / "quickstart.sh", ROOT / "scripts" / "claims.sh"]
    scripts += (ROOT / "scripts" / "quickstart").glob("*.sh")
    for script in scripts:
        for line in script.read_text(encoding="utf-8").splitlines():
            assert not re.search(
                r"(python3?|PYTHON\}?\"?)( -u)? -[mc] ", line.partition(" #")[0]
            ), f"{script}: {line}"


def test_claims_are_those_of_a_run_with_its_controls(tmp_path: Path) -> None:
    """scripts/claims.sh on stand-ins: it asks for the comparison, and for the language model that
    it states."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("claims.sh", "options.sh"):
        (tmp_path / "scripts" / name).write_text(
            (ROOT / "scripts" / name).read_text(encoding="utf-8")
        )
    for name in ("scripts/quickstart.sh", ".venv/bin/python"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$0" "$@"\n')
        (tmp_path / name).chmod(0o755)
    done = run(tmp_path, "bash scripts/claims.sh --seeds 2 --controls --record towers")
    started, checked = (
        line.replace(f"{tmp_path}/", "").split() for line in done.stdout.splitlines()
    )
    assert started[0] == "scripts/quickstart.sh", done.stderr
    assert {"--compare", "--controls"} <= set(started), done.stderr
    assert " ".join(started).endswith("--llava-llm tiny --seeds 3 --seeds 2 --controls")
    assert checked[1:] == [
        "scripts/check_claims.py",
        "quickstart-output/claims/default",
        "--record",
        "towers",
    ]
