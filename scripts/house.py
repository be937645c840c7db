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
        "precision",
        "quiet",
        "signals",
    ),
    ("outside", "progress", "report_text", "run_folder"),
    ("json_files", "hub", "pictures", "safetensors_header"),
    ("atomic", "hashes", "pages"),
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
FLOORS: dict[str, int] = {}  # package.room -> its floor
for floor, rooms in enumerate(ROOMS):
    for room in rooms:
        FLOORS[f"{PACKAGE}.{room}"] = floor
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
        for other in imported(tree, trees):
            if other != name:
                graph.add_edge(name, other)
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
        module = name.rpartition(".")[2]
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions.append((line_count(node), f"{module}.{node.name}"))
    return functions


def line_count(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def import_lines(trees: Iterable[ast.Module]) -> int:
    lines = 0
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                lines += line_count(node)
    return lines


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
        parts = path.relative_to(root).with_suffix("").parts
        sources[".".join(parts).removesuffix(".__init__")] = text
    return sources


def numbers(root: Path) -> dict[str, str]:
    """What is counted -> how much."""
    sources = modules(root)
    trees = {name: ast.parse(text) for name, text in sources.items()}
    graph = import_graph(trees)
    return {
        **count_files(sources, trees),
        **count_imports(graph),
        **count_around(root),
    }


def count_files(
    sources: Mapping[str, str], trees: Mapping[str, ast.Module]
) -> dict[str, str]:
    """Files, lines and functions of the packages."""
    lines_of = {name: text.count("\n") for name, text in sources.items()}
    total = sum(lines_of.values())
    longest = max(lines_of, key=lines_of.__getitem__)
    short = [name for name, lines in lines_of.items() if lines < 40]
    functions = functions_of(trees)
    function_lines = [lines for lines, _ in functions]
    longest_function_lines, longest_function = max(functions)
    return {
        "files": f"{len(lines_of):,}",
        "lines": f"{total:,}",
        "lines of a file, median": f"{median(lines_of.values()):.0f}",
        "longest file": f"{lines_of[longest]} ({longest.partition('.')[2]})",
        "lines of a function, median": f"{median(function_lines):.0f}",
        "longest function": f"{longest_function_lines} ({longest_function})",
        "import lines": f"{import_lines(trees.values()) / total:.1%}",
        "files under 40 lines": f"{len(short):,}",
    }


def count_imports(graph: networkx.DiGraph) -> dict[str, str]:
    """Who imports whom, in the packages."""
    with_one_importer = [name for name, importers in graph.in_degree if importers == 1]
    cycles = modules_in_cycles(graph)
    up = [f"{name} -> {other}" for name, other in graph.edges if goes_up(name, other)]
    below_tower = networkx.descendants(graph, f"{PACKAGE}.stages.tower")
    return {
        "files with one importer": f"{len(with_one_importer):,}",
        "files in import cycles": ", ".join([str(len(cycles)), *cycles]),
        "arrows up": ", ".join([str(len(up)), *up]),
        "files that train-tower imports": f"{len(below_tower) + 1:,}",
    }


def count_around(root: Path) -> dict[str, str]:
    """Lines of what lies next to the packages."""
    # older checkouts had benchmarks/ and nano/ next to scripts/
    scripts = ("scripts/**/*.py", "scripts/**/*.sh", "benchmarks/*.py", "nano/*.py")
    pages = texts(root, "*.md", "docs/**/*.md")
    words = sum(len(page.split()) for page in pages.values())
    return {
        "lines of scripts": f"{count_lines(root, *scripts):,}",
        "lines of tests": f"{count_lines(root, 'tests/**/*.py'):,}",
        "words of docs": f"{words:,}",
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
    if ast.unparse(node.func) not in ("importlib.import_module", "import_module"):
        return ""
    name = node.args[0]
    if isinstance(name, ast.Constant) and isinstance(name.value, str):
        return name.value
    return ""


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


def main() -> None:
    """Print the table: a column per checkout."""
    column_of = {word: columns_of(Path(word).resolve()) for word in sys.argv[1:]}
    if not column_of:
        column_of = {"this checkout": columns_of(Path(__file__).resolve().parents[1])}
    print(f"| | {' | '.join(column_of)} |")
    print("|---" * (1 + len(column_of)) + "|")
    names: dict[str, None] = {}  # of what is counted, in order
    for column in column_of.values():
        names |= dict.fromkeys(column)
    for name in names:
        cells = [column.get(name, "") for column in column_of.values()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
