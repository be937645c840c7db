#!/usr/bin/env python3
"""Find the few forms of code that a reader stumbles over; exits with 1 if there are any.

    scripts/plain.py [PATH ...]

What it finds, and what to write: a comprehension within a comprehension (a loop, or a function with
a name), `a, b = x, y` (one assignment a line), `for x in [value]` (an assignment), arithmetic or an
index with a truth value (an `if`), and a keyword with an underscore as a name (what the thing is).
"""

import ast
import keyword
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("llm2clip_plugin", "llava_integration", "scripts", "tests")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
MASKS = (ast.BitAnd, ast.BitOr, ast.BitXor)  # operators on masks of tensors


def is_truth(node: ast.expr) -> bool:
    """Whether an expression is True or False by its form."""
    if isinstance(node, ast.Compare):
        return True
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    if isinstance(node, ast.BoolOp):
        return all(is_truth(value) for value in node.values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in ("bool", "isinstance", "any", "all")
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def contains_comprehension(node: ast.AST) -> bool:
    inner = (child for child in ast.walk(node) if child is not node)
    return any(isinstance(child, COMPREHENSIONS) for child in inner)


def index_parts(node: ast.Subscript) -> list[ast.expr]:
    if not isinstance(node.slice, ast.Slice):
        return [node.slice]
    parts = (node.slice.lower, node.slice.upper, node.slice.step)
    return [part for part in parts if part]


def is_let(source: ast.expr) -> bool:
    """Whether a loop's source is a list or tuple of one value, which is not itself unpacked."""
    if not isinstance(source, (ast.List, ast.Tuple)):
        return False
    return len(source.elts) == 1 and not isinstance(source.elts[0], ast.Starred)


def problem(node: ast.AST) -> str:
    """What is wrong with a node; "" if nothing is."""
    if isinstance(node, COMPREHENSIONS) and contains_comprehension(node):
        return "comprehension within a comprehension"
    if isinstance(node, (ast.comprehension, ast.For)) and is_let(node.iter):
        return "a loop over one value"
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
        if isinstance(node.targets[0], ast.Tuple):
            return "several assignments in one"
    if isinstance(node, ast.BinOp) and not isinstance(node.op, MASKS):
        if is_truth(node.left) or is_truth(node.right):
            return "arithmetic with a truth value"
    if isinstance(node, ast.Subscript):
        return problem_of_index(node)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return problem_of_name(node.id)
    if isinstance(node, ast.arg):
        return problem_of_name(node.arg)
    return ""


def problem_of_index(node: ast.Subscript) -> str:
    if not isinstance(node.value, (ast.Name, ast.List, ast.Tuple, ast.Constant)):
        return ""
    truths = [part for part in index_parts(node) if is_truth(part)]
    if any(not isinstance(part, ast.Compare) for part in truths):
        return "an index that is a truth value"
    if truths and isinstance(node.slice, ast.Slice):
        return "a slice by a truth value"
    return ""  # a comparison as an index: a mask of a tensor


def problem_of_name(name: str) -> str:
    if name.endswith("_") and keyword.iskeyword(name.removesuffix("_")):
        return f"a keyword as a name ({name})"
    return ""


def problems(path: Path) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if text := problem(node):
            # a comprehension's loop has no line of its own
            holder = node.iter if isinstance(node, ast.comprehension) else node
            yield getattr(holder, "lineno", 0), text


def files(paths: list[str]) -> list[Path]:
    if not paths:
        paths = [str(ROOT / folder) for folder in FOLDERS]
    paths_found: list[Path] = []
    for path in map(Path, paths):
        paths_found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [path for path in paths_found if "golden" not in path.parts]


def main() -> int:
    count = 0
    for path in files(sys.argv[1:]):
        for line, text in sorted(problems(path)):
            print(f"{path}:{line}: {text}")
            count += 1
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
