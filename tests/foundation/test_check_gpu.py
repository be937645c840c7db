"""scripts/check_gpu.py: every check is run, a failing one is told apart, the outputs of the benchmarks are read."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import check_gpu


def check(code: str) -> "check_gpu.Check":
    return check_gpu.Check(title="a check", command=[sys.executable, "-c", code], read=check_gpu.pick)


def test_a_checks_values_are_read_from_the_json_that_ends_its_output() -> None:
    result = check_gpu.run(check("print('note {'); print('{\"rate\": 12.3456, \"sides\": [1, 2.5]}')"), 60)
    assert (result.passed, result.text) == (True, "rate 12.35; sides 1 / 2.5")


@pytest.mark.parametrize(
    ("code", "seconds", "text"),
    [
        ("raise SystemExit('no GPU memory left')", 60, "exit status 1: no GPU memory left"),
        ("print('nothing to read')", 60, "Expecting value"),
        ("import time; time.sleep(60)", 1, "out of time"),
    ],
)
def test_a_check_that_fails_says_why(code: str, seconds: float, text: str) -> None:
    result = check_gpu.run(check(code), seconds)
    assert not result.passed and text in result.text
    assert f"| a check | NO | {result.text} |" in check_gpu.markdown([result])


def test_a_step_whose_loss_differs_has_failed() -> None:
    line = (
        '{"tower": "tiny", "batch": 4, "ours_seconds": 0.5, "flop_share_of_peak": 0.25, "matmul_peak_gflops": 2000.0,'
        ' "ratio": 0.98, "wait_share": 0.01, "losses_agree": %s}'
    )
    assert check_gpu.steps(line % "true") == (
        "tiny: 8 images/s, MFU 0.25 of 2.0 TFLOP/s, 0.98x a bare loop, waits for data 1.0%"
    )
    with pytest.raises(ValueError, match="tiny: the first loss differs"):
        check_gpu.steps(line % "false")
