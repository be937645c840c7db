"""What the quickstart shows while it works, and that it imports nothing of the working
directory."""

import argparse
import json
import re
import subprocess
from pathlib import Path

import progress
import pytest

ROOT = Path(__file__).resolve().parents[3]
HEAD = """
set -euo pipefail
LOGS=logs
. "$ROOT/scripts/environments.sh"
. "$ROOT/scripts/quickstart/progress.sh"
trap_ends
plan "the environment" 60 0
plan "stage 1: fine-tuning" 20 200 1
plan "the page" 80 200
"""
PLAN = [
    progress.Stage("the environment", 60, 0, 0, 1),
    progress.Stage("stage 1: fine-tuning", 20, 200, 1, 1),
    progress.Stage("the page", 80, 200, 0, 1),
]


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
            rf"\[{number}/3\] {name} +\d+:\d\d elapsed, about .*left", line
        ), line
    # 60 + 20 + 80 seconds, and 400 at 100 GFLOPS: half of them at the 200 that are assumed
    assert lines[0].endswith("about 6 min left")
    # stages that were done before say nothing about the speed
    assert lines[2].endswith("about 3 min left")
    assert done.stdout == ""
    assert (tmp_path / "logs" / "02-stage-1.log").read_text() == "two\n"
    names_of_page = [
        line.split("\t")[1]
        for line in (tmp_path / "logs" / "seconds.tsv").read_text().splitlines()
    ]
    assert names_of_page == list(names)


@pytest.mark.parametrize(
    ("gflops", "took", "number", "elapsed", "fraction", "expected"),
    [
        # a slower machine: its speed alone is known
        (50, {0: 30}, 1, 0, 0.0, 20 + 400 + 80 + 400),
        # stage 1 is done and took twice as long as that
        (50, {0: 30, 1: 840}, 2, 0, 0.0, 2 * (80 + 400)),
        # a stage that an earlier run had finished says nothing
        (50, {0: 0, 1: 5}, 2, 0, 0.0, 80 + 400),
        # half of stage 1 took as long as expected
        (100, {0: 30}, 1, 120, 0.5, 100 + 80 + 200),
        # half of it took twice as long: so does the rest, and what comes later
        (100, {0: 30}, 1, 240, 0.5, 200 + 2 * (80 + 200)),
        # a stage without steps that takes longer than expected: the later ones are left
        (100, {0: 30, 1: 220}, 2, 999, 0.0, 0),
    ],
)
def test_the_time_left_follows_what_this_machine_measures(
    gflops, took, number, elapsed, fraction, expected
) -> None:
    left = progress.seconds_left(PLAN, took, number, elapsed, fraction, gflops)
    assert left == pytest.approx(expected)


def test_the_steps_of_bars_that_move_together_are_added() -> None:
    text = "train: 0/12 steps, ? left\ntrain: 3/12 steps, 0.1 steps/s, loss 1.9\nheads: 9/9 steps"
    alone = progress.Stage("stage 1", 20, 200, 1, 1)
    assert progress.read_steps(text, alone) == progress.Steps(3, 12, "steps", 0.25)
    assert progress.read_steps("heads: 9/9 steps", alone) is None
    # two processes; of each four samples only one costs time
    both = "embed: 81/1304 samples, 2 s\nembed: 500/4004 samples, 3 s\n"
    embed = progress.Stage("embedding", 20, 200, 2, 4)
    steps = progress.read_steps(both, embed)
    assert steps is not None
    assert (steps.done, steps.total) == (581, 326 + 1001)
    assert steps.fraction == pytest.approx((81 / 326 + 500 / 1001) / 2)
    # of two sides, one has not begun
    sides = progress.Stage("LLaVA", 20, 200, 2, 1)
    one = progress.read_steps("LLaVA after: 70/140 steps, loss 1", sides)
    assert one is not None
    assert one.fraction == pytest.approx(0.25)


def test_between_two_steps_the_time_left_counts_down(tmp_path: Path) -> None:
    (tmp_path / "took.tsv").write_text("0\t30\n")
    lines = ["\t".join(map(str, stage)) for stage in PLAN]
    (tmp_path / "plan.tsv").write_text("\n".join(lines) + "\n")
    speed = tmp_path / "models.json"
    speed.write_text(json.dumps({"gflops": 100}))
    log = tmp_path / "stage.log"
    log.write_text("of an earlier run: train: 12/12 steps\n")
    options = argparse.Namespace(
        folder=tmp_path,
        stage=1,
        log=log,
        log_start=log.stat().st_size,
        speed=speed,
        began=1000.0,
        run_began=970.0,
    )
    display = progress.Display(options)
    assert display.line(1000.0).endswith("0:30 elapsed, about 8 min left")
    with log.open("a") as file:
        file.write("train: 0/12 steps, ? left\n")
    display.line(1020.0)
    with log.open("a") as file:
        file.write("train: 6/12 steps, 0.05 steps/s\n")
    line = display.line(1120.0)
    assert "[##########----------] 6/12 steps, 16.7 s each" in line
    assert line.endswith("2:30 elapsed, about 6 min left")  # 100 + 80 + 200
    assert display.line(1330.0).endswith("6:00 elapsed, about 170 s left")


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
        "quickstart-output/claims/table",
        "--record",
        "towers",
    ]
