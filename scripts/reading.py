"""How densely a checkout's code is written: what makes a line long to read,
counted in its syntax tree.

Lines of code are lines that are not blank, a comment or part of a docstring.
"""

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LONG_LINE = 110  # characters
# names that say nothing about what they hold
FILLERS = {"told", "own", "one", "found", "known", "fix", "place", "shown"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
IMPORTS = (ast.Import, ast.ImportFrom)


@dataclass
class Counts:
    """Sums over files."""

    lines: int = 0
    characters: int = 0
    long_lines: int = 0
    lines_without_imports: int = 0
    statements: int = 0  # without imports
    nodes: int = 0  # of the syntax tree, without imports
    nested_comprehensions: int = 0
    packed_assignments: int = 0  # a, b = x, y
    assigned_names: int = 0
    filler_names: int = 0

    def add_file(self, text: str) -> None:
        tree = ast.parse(text)
        docstrings = docstring_lines(tree)
        imports = lines_of(node for node in ast.walk(tree) if isinstance(node, IMPORTS))
        for number, line in enumerate(text.split("\n"), 1):
            stripped = line.strip()
            if not stripped or stripped.startswith("#") or number in docstrings:
                continue
            self.lines += 1
            self.characters += len(line)
            if len(line) > LONG_LINE:
                self.long_lines += 1
            if number not in imports:
                self.lines_without_imports += 1
        self.nodes += count_nodes(tree)
        for node in ast.walk(tree):
            self.add_node(node)

    def add_node(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt) and not isinstance(node, IMPORTS):
            self.statements += 1
        if isinstance(node, COMPREHENSIONS) and contains_comprehension(node):
            self.nested_comprehensions += 1
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            if isinstance(node.targets[0], ast.Tuple):
                self.packed_assignments += 1
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            self.assigned_names += 1
            if node.id in FILLERS:
                self.filler_names += 1

    def rows(self) -> dict[str, str]:
        """What is counted -> how much."""
        characters = self.characters / self.lines
        long_lines = self.long_lines / self.lines
        nodes_a_line = self.nodes / self.lines_without_imports
        nodes_a_statement = self.nodes / self.statements
        thousands = self.lines / 1000
        nested = self.nested_comprehensions / thousands
        packed = self.packed_assignments / thousands
        fillers = self.filler_names / self.assigned_names
        return {
            "lines of code": f"{self.lines:,}",
            "characters a line": f"{characters:.1f}",
            f"lines over {LONG_LINE} characters": f"{long_lines:.1%}",
            "syntax nodes a line": f"{nodes_a_line:.1f}",
            "syntax nodes a statement": f"{nodes_a_statement:.1f}",
            "comprehensions in comprehensions, per 1,000 lines": f"{nested:.1f}",
            "`a, b = x, y`, per 1,000 lines": f"{packed:.1f}",
            "filler names, of all assigned": f"{fillers:.2%}",
        }


def docstring_lines(tree: ast.Module) -> set[int]:
    docstrings = []
    for node in ast.walk(tree):
        if not isinstance(node, DOCUMENTED):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            docstrings.append(node.body[0])
    return lines_of(docstrings)


def lines_of(nodes: Iterable[ast.stmt]) -> set[int]:
    lines: set[int] = set()
    for node in nodes:
        lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def count_nodes(node: ast.AST) -> int:
    if isinstance(node, IMPORTS):
        return 0
    return 1 + sum(map(count_nodes, ast.iter_child_nodes(node)))


def contains_comprehension(node: ast.AST) -> bool:
    inner = (child for child in ast.walk(node) if child is not node)
    return any(isinstance(child, COMPREHENSIONS) for child in inner)


def count_reading(root: Path, folders: Iterable[str]) -> dict[str, str]:
    """The counts of all Python files of a checkout's folders."""
    counts = Counts()
    for folder in folders:
        for path in sorted((root / folder).glob("**/*.py")):
            counts.add_file(path.read_text(encoding="utf-8"))
    return counts.rows() if counts.lines else {}
