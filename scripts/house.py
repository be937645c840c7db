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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median

PACKAGE, LLAVA = "llm2clip_plugin", "llava_integration"
ROOMS = (("data", "vision"), ("train",), ("text",), ("evaluate",), ("stages",), ("cli", "doctor", "pipeline"))
FLOORS = {f"{PACKAGE}.{room}": floor for floor, rooms in enumerate(ROOMS, 1) for room in rooms}  # all others: 0
SCRIPTS = ("scripts/**/*.py", "scripts/**/*.sh", "benchmarks/*.py")
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

    def imported(self, tree: ast.Module) -> Iterator[str]:
        """The modules that one imports, inside functions too."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name in self.trees)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    names = (f"{node.module}.{alias.name}", node.module)
                    yield from [name for name in names if name in self.trees][:1]

    def count(self, *patterns: str, words: bool = False) -> int:
        """Lines, or words, of the files that match."""
        texts = [path.read_text(encoding="utf-8") for one in patterns for path in sorted(self.root.glob(one))]
        return sum(len(text.split()) if words else text.count("\n") for text in texts)

    def numbers(self) -> dict[str, str]:
        """What is counted -> how much."""
        graph = {name: {*self.imported(tree)} - {name} for name, tree in self.trees.items()}
        nodes = [(name.rpartition(".")[2], node) for name, tree in self.trees.items() for node in ast.walk(tree)]
        functions = [
            ((node.end_lineno or 0) - node.lineno + 1, f"{file}.{node.name}")
            for file, node in nodes
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        imports = [node for _, node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
        import_lines = sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in imports)
        importers = Counter(other for targets in graph.values() for other in targets)
        up = sum(goes_up(name, other) for name, targets in graph.items() for other in targets)
        start = [name for name in COMMANDS if name in graph][:1]
        total, longest = sum(self.lines.values()), max(self.lines, key=self.lines.__getitem__)
        return {
            "files": f"{len(self.lines):,}",
            "lines": f"{total:,}",
            "lines of a file, median": f"{median(self.lines.values()):.0f}",
            "longest file": f"{self.lines[longest]} ({longest.partition('.')[2]})",
            "lines of a function, median": f"{median(size for size, _ in functions):.0f}",
            "longest function": "{} ({})".format(*max(functions)),
            "import lines": f"{import_lines / total:.1%}",
            "files under 40 lines": str(sum(lines < 40 for lines in self.lines.values())),
            "files with one importer": str(sum(count == 1 for count in importers.values())),
            "files in import cycles": str(sum(name in reached(graph, graph[name]) for name in graph)),
            "arrows up": str(up),
            "files that train-tower imports": str(len(reached(graph, start))),
            "lines of scripts/ and benchmarks/": f"{self.count(*SCRIPTS):,}",
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
