#!/usr/bin/env python3
"""The house in numbers: files, lines, functions, imports and arrows of a checkout, or of two side
by side.

    scripts/house.py [CHECKOUT [OTHER]]

Counts the Python files of the two packages, where nothing else is said. An arrow up is an import
from a room on the same floor or a higher one. llava_integration may import only the five lowest
floors and vision; only stages and doctor may import it.
"""

import ast
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from statistics import median

import networkx

PACKAGE = "llm2clip_plugin"
LLAVA = "llava_integration"
ROOMS = (
    "processes|bootstrap bounds console files installation launch|contracts|folders pretrained|options|status|"
    "data vision|train|text|evaluate|stages|cli doctor"
)
FLOORS = {
    f"{PACKAGE}.{room}": floor
    for floor, rooms in enumerate(ROOMS.split("|"))
    for room in rooms.split()
}
# Floors that LLaVA's side may import, besides vision; who may import that
FOR_LLAVA = (0, 1, 2, 3, 4, 5)
OF_LLAVA = (f"{PACKAGE}.stages", f"{PACKAGE}.doctor")


def numbers(root: Path) -> dict[str, str]:
    """What is counted -> how much."""

    def texts(*patterns: str) -> dict[Path, str]:
        return {
            path: path.read_text(encoding="utf-8")
            for one in patterns
            for path in sorted(root.glob(one))
        }

    def count(*patterns: str) -> int:
        return sum(text.count("\n") for text in texts(*patterns).values())

    trees: dict[str, ast.Module] = {}
    lines: dict[str, int] = {}
    for path, text in texts(f"{PACKAGE}/**/*.py", f"{LLAVA}/**/*.py").items():
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(text)
        lines[name] = text.count("\n")
    if not trees:
        sys.exit(f"error: {root} is no checkout: it has no {PACKAGE}")
    graph = networkx.DiGraph(
        {name: {*imported(tree, trees)} - {name} for name, tree in trees.items()}
    )
    functions: list[tuple[int, str]] = []
    imports = 0
    for name, tree in trees.items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.stmt)):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions.append((size, f"{name.rpartition('.')[2]}.{node.name}"))
            imports += size * isinstance(node, (ast.Import, ast.ImportFrom))
    cycles = [
        name
        for one in networkx.strongly_connected_components(graph)
        if len(one) > 1
        for name in sorted(one)
    ]
    up = [f"{name} -> {other}" for name, other in graph.edges if goes_up(name, other)]
    total = sum(lines.values())
    longest = max(lines, key=lines.__getitem__)
    found = {
        "files": len(lines),
        "lines": total,
        "lines of a file, median": f"{median(lines.values()):.0f}",
        "longest file": f"{lines[longest]} ({longest.partition('.')[2]})",
        "lines of a function, median": f"{median(lengths for lengths, _ in functions):.0f}",
        "longest function": "{} ({})".format(*max(functions)),
        "import lines": f"{imports / total:.1%}",
        "files under 40 lines": sum(of_file < 40 for of_file in lines.values()),
        "files with one importer": sum(times == 1 for _, times in graph.in_degree),
        "files in import cycles": ", ".join([str(len(cycles)), *cycles]),
        "arrows up": ", ".join([str(len(up)), *up]),
        "files that train-tower imports": len(
            networkx.descendants(graph, f"{PACKAGE}.stages.tower")
        )
        + 1,
        # older checkouts had benchmarks/ and nano/ beside scripts/
        "lines of scripts": count(
            "scripts/**/*.py", "scripts/**/*.sh", "benchmarks/*.py", "nano/*.py"
        ),
        "lines of tests": count("tests/**/*.py"),
        "words of docs": sum(len(text.split()) for text in texts("*.md", "docs/**/*.md").values()),
    }
    return {name: one if isinstance(one, str) else f"{one:,}" for name, one in found.items()}


def imported(tree: ast.Module, known: Collection[str]) -> Iterator[str]:
    """The modules that one imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield from [
                    one for one in (f"{node.module}.{alias.name}", node.module) if one in known
                ][:1]
        elif (name := imported_by_name(node)) in known:
            yield name


def imported_by_name(node: ast.AST) -> str:
    """The module of ``importlib.import_module("NAME")``; "" for any other node."""
    if not isinstance(node, ast.Call) or not node.args:
        return ""
    called = ast.unparse(node.func)
    name = node.args[0]
    if called not in ("importlib.import_module", "import_module"):
        return ""
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""


def goes_up(name: str, other: str) -> bool:
    """Whether an import goes against the order of the rooms. The package's own __init__ is free: it
    imports late."""
    room, others = (".".join(one.split(".")[:2]) for one in (name, other))
    if name.startswith(LLAVA):
        return (
            not others.startswith((LLAVA, f"{PACKAGE}.vision"))
            and FLOORS.get(others, 0) not in FOR_LLAVA
        )
    if other.startswith(LLAVA):
        return room not in OF_LLAVA
    return name != PACKAGE and room != others and FLOORS.get(others, 0) >= FLOORS.get(room, 0)


if __name__ == "__main__":
    roots = [Path(word) for word in sys.argv[1:]] or [Path(__file__).resolve().parents[1]]
    columns = [numbers(root) for root in roots]
    print(f"| | {' | '.join(map(str, roots))} |\n|---{'|---' * len(roots)}|")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")
