#!/usr/bin/env python3
"""The house in numbers: files, lines, functions, imports and arrows of a checkout, or of two side by side.

    scripts/house.py [CHECKOUT [OTHER]]

Counts the Python files of the two packages, where nothing else is said. An arrow up is an import of a room from one
that lies below it; LLaVA's package may import the lowest floor and vision alone, and only stages and commands import
it.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from statistics import median

PACKAGE, LLAVA = "llm2clip_plugin", "llava_integration"
ROOMS = (("data", "vision"), ("train",), ("text",), ("evaluate",), ("stages",), ("cli", "doctor", "pipeline"))
FLOORS = {f"{PACKAGE}.{room}": floor for floor, rooms in enumerate(ROOMS, 1) for room in rooms}  # all others: 0
COMMANDS = (f"{PACKAGE}.stages.tower.command", f"{PACKAGE}.stages.tower")  # where train-tower begins


class House:
    """A checkout. Module -> its syntax, and its lines."""

    def __init__(self, root: Path) -> None:
        self.root, self.trees, self.lines = root, dict[str, ast.Module](), dict[str, int]()
        for path in sorted(path for package in (PACKAGE, LLAVA) for path in root.glob(f"{package}/**/*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            self.trees[name], self.lines[name] = ast.parse(text), text.count("\n")
        if not self.trees:
            sys.exit(f"error: {root} is no checkout: it has no {PACKAGE}")

    @cached_property
    def graph(self) -> dict[str, set[str]]:
        """Module -> the modules that it imports, inside functions too."""
        return {name: {*self._imported(tree)} - {name} for name, tree in self.trees.items()}

    def _imported(self, tree: ast.Module) -> Iterable[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name in self.trees)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    names = (f"{node.module}.{alias.name}", node.module)
                    yield from [name for name in names if name in self.trees][:1]

    @cached_property
    def functions(self) -> list[tuple[int, str]]:
        """(lines, name) of every function."""
        return [
            ((node.end_lineno or 0) - node.lineno + 1, f"{name.rpartition('.')[2]}.{node.name}")
            for name, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]

    @property
    def import_lines(self) -> int:
        """Lines of import statements."""
        nodes = (node for tree in self.trees.values() for node in ast.walk(tree))
        spans = ((node.lineno, node.end_lineno) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)))
        return sum((end or start) - start + 1 for start, end in spans)

    @property
    def one_importer(self) -> int:
        """Files that exactly one other file imports."""
        importers = Counter(other for targets in self.graph.values() for other in targets)
        return sum(count == 1 for count in importers.values())

    @property
    def in_circles(self) -> int:
        """Files that import themselves by way of others."""
        return sum(name in reached(self.graph, self.graph[name]) for name in self.graph)

    @property
    def arrows_up(self) -> int:
        """Imports against the order of the rooms."""
        return sum(goes_up(name, other) for name, targets in self.graph.items() for other in targets)

    @property
    def of_training(self) -> int:
        """Files that train-tower imports, directly or not."""
        return len(reached(self.graph, [name for name in COMMANDS if name in self.graph][:1]))

    def count(self, *patterns: str, words: bool = False) -> int:
        """Lines, or words, of the files that match."""
        texts = [path.read_text(encoding="utf-8") for one in patterns for path in sorted(self.root.glob(one))]
        return sum(len(text.split()) if words else text.count("\n") for text in texts)

    def numbers(self) -> dict[str, str]:
        """What is counted -> how much."""
        scripts = self.count("scripts/**/*.py", "scripts/**/*.sh", "benchmarks/*.py")
        total, longest = sum(self.lines.values()), max(self.lines, key=self.lines.__getitem__)
        return {
            "files": f"{len(self.lines):,}",
            "lines": f"{total:,}",
            "lines of a file, median": f"{median(self.lines.values()):.0f}",
            "longest file": f"{self.lines[longest]} ({longest.partition('.')[2]})",
            "lines of a function, median": f"{median(size for size, _ in self.functions):.0f}",
            "longest function": "{} ({})".format(*max(self.functions)),
            "import lines": f"{self.import_lines / total:.1%}",
            "files under 40 lines": str(sum(lines < 40 for lines in self.lines.values())),
            "files with one importer": str(self.one_importer),
            "files in import cycles": str(self.in_circles),
            "arrows up": str(self.arrows_up),
            "files that train-tower imports": str(self.of_training),
            "lines of scripts/ and benchmarks/": f"{scripts:,}",
            "lines of tests": f"{self.count('tests/**/*.py'):,}",
            "words of docs": f"{self.count('*.md', 'docs/**/*.md', words=True):,}",
        }


def reached(graph: Mapping[str, set[str]], starts: Iterable[str]) -> set[str]:
    """The starts and what they import, directly or not."""
    found, left = set[str](), [*starts]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += graph[name]
    return found


def floor_of(name: str) -> int:
    return FLOORS.get(".".join(name.split(".")[:2]), 0)


def goes_up(name: str, other: str) -> bool:
    """Whether an import goes against the order of the rooms. The package's own __init__ is free: it imports late."""
    if name == PACKAGE:
        return False
    if name.startswith(LLAVA):
        return floor_of(other) > 0 and not other.startswith(f"{PACKAGE}.vision")
    return floor_of(other) > floor_of(name) or (other.startswith(LLAVA) and floor_of(name) < len(ROOMS) - 1)


def main() -> None:
    """Print a table."""
    roots = [Path(word) for word in sys.argv[1:]] or [Path(__file__).resolve().parents[1]]
    columns = [House(root).numbers() for root in roots]
    print(f"| | {' | '.join(str(root) for root in roots)} |\n|---{'|---' * len(roots)}|")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


if __name__ == "__main__":
    main()
