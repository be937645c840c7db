"""The planted bugs of tests/mutations still apply, and their tests exist; `make mutations` runs
them."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "mutations"))
from planted import PLANTED, Bug  # noqa: E402


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_a_planted_bug_applies_and_has_a_test(bug: Bug) -> None:
    assert bug.plant((ROOT / bug.file).read_text(encoding="utf-8"))
    path, name = bug.test.partition("[")[0].split("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_names_are_distinct() -> None:
    assert len({bug.name for bug in PLANTED}) == len(PLANTED)
