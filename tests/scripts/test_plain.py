"""scripts/plain.py finds each form that a reader stumbles over, and none in plain code."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "plain.py"
SPEC = importlib.util.spec_from_file_location("plain", SCRIPT)
assert SPEC
assert SPEC.loader
plain = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plain)

NESTED = "comprehension within a comprehension"
ONE_VALUE = "a loop over one value"
PACKED = "several assignments in one"
ARITHMETIC = "arithmetic with a truth value"
INDEX = "an index that is a truth value"
SLICE = "a slice by a truth value"

# code, and what the script says about it
FORMS = [
    ("[[x for x in row] for row in rows]", NESTED),
    ("{x for x in sorted(y for y in z)}", NESTED),
    ("{k: [v for v in vs] for k, vs in m}", NESTED),
    ("sum(any(w in c for w in words) for c in captions)", NESTED),
    ("a, b = 1, 2", PACKED),
    ("a, *b = x, y", PACKED),
    ("for x in [value]: pass", ONE_VALUE),
    ("[f(x) for x in (value,)]", ONE_VALUE),
    ("total += 1 + (a == b)", ARITHMETIC),
    ("parts = [1] * bool(x)", ARITHMETIC),
    ("text = 'plural' + 's' * (n != 1)", ARITHMETIC),
    ("n = count - (not x)", ARITHMETIC),
    ("n = 1 * (a > b and c < d)", ARITHMETIC),
    ("n = 2 * isinstance(x, int)", ARITHMETIC),
    ("SIDES[not held_out]", INDEX),
    ("('no', 'yes')[bool(x)]", INDEX),
    ("names[: hint is not bool]", SLICE),
    ("names[not x :]", INDEX),
    ("class_ = 1", "a keyword as a name (class_)"),
    ("def f(is_): pass", "a keyword as a name (is_)"),
]
PLAIN = [
    "[x for row in rows for x in row]",
    "a, b = pair",
    "a, b = f()",
    "a = b = 0",
    "a = 1, 2",
    "for x in [one, two]: pass",
    "for x in [*values]: pass",
    "for x in values: pass",
    "n = a + b",
    "kept = (a > 0) & (b < 1)",
    "kept = (a > 0) | ~(b < 1)",
    "rows[index]",
    "rows[1:-1]",
    "rows[table == 0]",
    "frame.loc[not x]",
    "flag = not x",
    "n = 1 if x == y else 0",
    "type_of = 1",
    "self_ = 1",
    "def f(*, is_bool): pass",
]


def problems_of(tmp_path: Path, code: str) -> list[str]:
    path = tmp_path / "code.py"
    path.write_text(f"{code}\n")
    return [text for _, text in plain.problems(path)]


@pytest.mark.parametrize("code, problem", FORMS)
def test_each_form_is_found(tmp_path: Path, code: str, problem: str) -> None:
    assert problems_of(tmp_path, code) == [problem]


@pytest.mark.parametrize("code", PLAIN)
def test_plain_code_passes(tmp_path: Path, code: str) -> None:
    assert problems_of(tmp_path, code) == []


def test_a_line_for_each_and_the_exit_status(tmp_path: Path) -> None:
    (tmp_path / "golden").mkdir()
    # others' code is not read
    (tmp_path / "golden" / "theirs.py").write_text("a, b = 1, 2\n")
    (tmp_path / "clean.py").write_text("a = 1\n")
    clean = subprocess.run(
        [sys.executable, SCRIPT, tmp_path], capture_output=True, text=True
    )
    assert clean.returncode == 0
    assert clean.stdout == ""
    path = tmp_path / "code.py"
    path.write_text("a = 1\nrows = [\n    [x for x in [value]]\n]\nb, c = 1, 2\n")
    dirty = subprocess.run(
        [sys.executable, SCRIPT, tmp_path], capture_output=True, text=True
    )
    assert dirty.returncode == 1
    assert dirty.stdout.splitlines() == [
        f"{path}:3: {ONE_VALUE}",
        f"{path}:5: {PACKED}",
    ]
