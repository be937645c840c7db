#!/usr/bin/env python3
"""The house in numbers: files, lines, functions, imports and arrows of checkouts side by side, and
how densely their code is written (reading.py), also of other projects.

    scripts/house.py [CHECKOUT ...]

Counts the Python files of the two packages, where nothing else is said; of another project, those
of src/ or of the folder with its name. An arrow up is an import
from a room on the same floor or a higher one. llava_integration may import only the floors below
data, and vision; only stages and doctor may import it.
"""

import ast
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median

import networkx
from reading import count_reading

PACKAGE = "llm2clip_plugin"
LLAVA = "llava_integration"
ROOMS = (  # of each floor, the lowest first
    ("processes",),
    (
        "bootstrap",
        "bounds",
        "discovery",
        "errors",
        "installation",
        "launch",
        "quiet",
        "signals",
    ),
    ("outside", "pages", "progress", "report_text", "run_folder"),
    ("json_files", "hub", "safetensors_header"),
    ("atomic", "hashes"),
    ("contracts", "metrics"),
    ("folders", "pretrained"),
    ("options",),
    ("status",),
    ("data", "vision"),
    ("train",),
    ("text",),
    ("evaluate",),
    ("plan",),
    ("stages",),
    ("cli", "doctor"),
)
FLOORS = {
    f"{PACKAGE}.{room}": floor for floor, rooms in enumerate(ROOMS) for room in rooms
}
# Floors that LLaVA's side may import, besides vision; who may import that
FOR_LLAVA = (0, 1, 2, 3, 4, 5, 6, 7, 8)
OF_LLAVA = (f"{PACKAGE}.stages", f"{PACKAGE}.doctor")


def texts(root: Path, *patterns: str) -> dict[Path, str]:
    """File -> its text."""
    paths = [path for pattern in patterns for path in sorted(root.glob(pattern))]
    return {path: path.read_text(encoding="utf-8") for path in paths}


def count_lines(root: Path, *patterns: str) -> int:
    return sum(text.count("\n") for text in texts(root, *patterns).values())


def import_graph(trees: Mapping[str, ast.Module]) -> networkx.DiGraph:
    """An edge from each module to those that it imports."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(trees)
    for name, tree in trees.items():
        graph.add_edges_from(
            (name, other) for other in imported(tree, trees) if other != name
        )
    return graph


def modules_in_cycles(graph: networkx.DiGraph) -> list[str]:
    modules: list[str] = []
    for component in networkx.strongly_connected_components(graph):
        if len(component) > 1:
            modules += sorted(component)
    return modules


def functions_of(trees: Mapping[str, ast.Module]) -> list[tuple[int, str]]:
    """(lines, module.function)"""
    functions = []
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions.append(
                    (line_count(node), f"{name.rpartition('.')[2]}.{node.name}")
                )
    return functions


def line_count(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def import_lines(trees: Iterable[ast.Module]) -> int:
    nodes = (node for tree in trees for node in ast.walk(tree))
    return sum(
        line_count(node)
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
    )


def columns_of(root: Path) -> dict[str, str]:
    """What is counted in a checkout -> how much; of another project, how it reads alone."""
    if (root / PACKAGE).is_dir():
        in_scripts = count_reading(root, ["scripts"])
        of_scripts = {f"scripts: {name}": value for name, value in in_scripts.items()}
        return {**numbers(root), **count_reading(root, [PACKAGE, LLAVA]), **of_scripts}
    reading = count_reading(root, ["src"]) or count_reading(root, [root.name])
    if not reading:
        sys.exit(
            f"error: {root} has neither {PACKAGE} nor src nor {root.name} with Python files"
        )
    return reading


def modules(root: Path) -> dict[str, str]:
    """Each module of the two packages -> its text."""
    sources: dict[str, str] = {}
    for path, text in texts(root, f"{PACKAGE}/**/*.py", f"{LLAVA}/**/*.py").items():
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(
            ".__init__"
        )
        sources[name] = text
    return sources


def numbers(root: Path) -> dict[str, str]:
    """What is counted -> how much."""
    sources = modules(root)
    trees = {name: ast.parse(text) for name, text in sources.items()}
    lines = {name: text.count("\n") for name, text in sources.items()}
    graph = import_graph(trees)
    functions = functions_of(trees)
    cycles = modules_in_cycles(graph)
    up = [f"{name} -> {other}" for name, other in graph.edges if goes_up(name, other)]
    total = sum(lines.values())
    longest = max(lines, key=lines.__getitem__)
    trains_tower = networkx.descendants(graph, f"{PACKAGE}.stages.tower")
    # older checkouts had benchmarks/ and nano/ beside scripts/
    scripts = ("scripts/**/*.py", "scripts/**/*.sh", "benchmarks/*.py", "nano/*.py")
    pages = texts(root, "*.md", "docs/**/*.md")
    return {
        "files": f"{len(lines):,}",
        "lines": f"{total:,}",
        "lines of a file, median": f"{median(lines.values()):.0f}",
        "longest file": f"{lines[longest]} ({longest.partition('.')[2]})",
        "lines of a function, median": f"{median(length for length, _ in functions):.0f}",
        "longest function": "{} ({})".format(*max(functions)),
        "import lines": f"{import_lines(trees.values()) / total:.1%}",
        "files under 40 lines": f"{sum(length < 40 for length in lines.values()):,}",
        "files with one importer": f"{sum(count == 1 for _, count in graph.in_degree):,}",
        "files in import cycles": ", ".join([str(len(cycles)), *cycles]),
        "arrows up": ", ".join([str(len(up)), *up]),
        "files that train-tower imports": f"{len(trains_tower) + 1:,}",
        "lines of scripts": f"{count_lines(root, *scripts):,}",
        "lines of tests": f"{count_lines(root, 'tests/**/*.py'):,}",
        "words of docs": f"{sum(len(page.split()) for page in pages.values()):,}",
    }


def imported(tree: ast.Module, modules: Collection[str]) -> Iterator[str]:
    """The ``modules`` that one imports, inside functions and by name too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in modules:
                    yield submodule
                elif node.module in modules:
                    yield node.module
        elif (name := imported_by_name(node)) in modules:
            yield name


def imported_by_name(node: ast.AST) -> str:
    """The module of ``importlib.import_module("NAME")``; "" for any other node."""
    if not isinstance(node, ast.Call) or not node.args:
        return ""
    called = ast.unparse(node.func)
    name = node.args[0]
    if called not in ("importlib.import_module", "import_module"):
        return ""
    return (
        name.value
        if isinstance(name, ast.Constant) and isinstance(name.value, str)
        else ""
    )


def room_of(module: str) -> str:
    """Package and room, as in FLOORS."""
    return ".".join(module.split(".")[:2])


def goes_up(name: str, other: str) -> bool:
    """Whether an import goes against the order of the rooms. The package's own __init__ is free: it
    imports late."""
    room = room_of(name)
    other_room = room_of(other)
    if name.startswith(LLAVA):
        is_free = other_room.startswith((LLAVA, f"{PACKAGE}.vision"))
        return not is_free and FLOORS.get(other_room, 0) not in FOR_LLAVA
    if other.startswith(LLAVA):
        return room not in OF_LLAVA
    if name == PACKAGE or room == other_room:
        return False
    return FLOORS.get(other_room, 0) >= FLOORS.get(room, 0)


if __name__ == "__main__":
    roots = [
        Path(word).resolve() for word in sys.argv[1:] or [Path(__file__).parents[1]]
    ]
    columns = [columns_of(root) for root in roots]
    titles = [str(word) for word in sys.argv[1:] or ["this checkout"]]
    print(f"| | {' | '.join(titles)} |\n|---{'|---' * len(roots)}|")
    for name in dict.fromkeys(name for column in columns for name in column):
        print(f"| {name} | {' | '.join(column.get(name, '') for column in columns)} |")
