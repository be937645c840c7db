"""The house keeps its arrows: who may import whom, and which heavy package has which home."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PACKAGE = "llm2clip_plugin"
# Floors from the bottom up: a room may import from the floors below its own, never beside or above.
FLOORS = [floor.split() for floor in "bootstrap console files|contracts options|status|data vision".split("|")]
FLOORS += [["train"], ["text"], ["evaluate"], ["stages"], ["doctor", "cli"]]
FLOOR_OF = {f"{PACKAGE}.{room}": floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LLAVA = "llava_integration"
LLAVA_MAY_IMPORT = {f"{PACKAGE}.vision", *(f"{PACKAGE}.{room}" for floor in FLOORS[:3] for room in floor)}
MAY_IMPORT_LLAVA = {f"{PACKAGE}.doctor", f"{PACKAGE}.stages"}  # ask about LLaVA where LLaVA is installed

HOMES = {  # heavy package -> the only places that may import it
    "deepspeed": {"llm2clip_plugin/train/engine.py", "llava_integration/training.py"},
    "peft": {"llm2clip_plugin/text/", "llm2clip_plugin/vision/towers.py", "llava_integration/compat/"},
    "bitsandbytes": {"llm2clip_plugin/text/", "llm2clip_plugin/train/optim.py"},
    "llava": {"llava_integration/"},
    "vllm": {"llava_integration/serve/"},
}


@cache
def sources() -> list[Path]:
    return sorted([*ROOT.glob("llm2clip_plugin/**/*.py"), *ROOT.glob("llava_integration/**/*.py")])


@cache
def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports, anywhere or at import time alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def room_of(name: str) -> str | None:
    """The room that a dotted name lies in: a folder or file of the package's top level, or LLaVA's package."""
    if name == LLAVA or name.startswith(f"{LLAVA}."):
        return LLAVA
    return next((room for room in FLOOR_OF if name == room or name.startswith(f"{room}.")), None)


def may_import(room: str, other: str) -> bool:
    if room == other:
        return True
    if room == LLAVA:
        return other in LLAVA_MAY_IMPORT
    if other == LLAVA:
        return room in MAY_IMPORT_LLAVA
    return FLOOR_OF[other] < FLOOR_OF[room]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    room = room_of(module_of(path))
    if room is None:  # llm2clip_plugin/__init__.py: names by attribute only
        assert path == ROOT / PACKAGE / "__init__.py"
        assert {name.split(".")[0] for name in imported(path, top_level_only=True)} <= {"importlib", "typing"}
        return
    for name in imported(path):
        other = room_of(name)
        assert other is None or may_import(room, other), f"{path.relative_to(ROOT)}: {room} may not import {name}"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def arrows() -> dict[str, set[str]]:
    """Every file of both packages -> the files that it imports, inside functions and under TYPE_CHECKING too."""
    modules = {module_of(path): path for path in sources()}
    return {name: {other for other in imported(path) if other in modules} - {name} for name, path in modules.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The files of one circle of imports, the first one repeated at the end; [] if there is none."""
    done: set[str] = set()

    def search(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        path = next(filter(None, (search(other, [*way, name]) for other in sorted(graph[name]))), [])
        done.add(name)
        return path

    return next(filter(None, (search(name, []) for name in sorted(graph))), [])


def test_no_circle_of_files() -> None:
    assert circle(arrows()) == []


@pytest.mark.parametrize("package, homes", HOMES.items(), ids=HOMES)
def test_heavy_packages_have_one_home(package: str, homes: set[str]) -> None:
    for path in sources():
        where = path.relative_to(ROOT).as_posix()
        uses = any(name == package or name.startswith(package + ".") for name in imported(path))
        assert not uses or any(where.startswith(home) for home in homes), (
            f"{where} imports {package}; its home is {homes}"
        )


def test_what_reads_files_and_options_is_standard_library_only() -> None:
    for name in ("contracts", "files", "options"):
        names = imported(ROOT / PACKAGE / f"{name}.py", top_level_only=True)
        assert {name.split(".")[0] for name in names} <= {PACKAGE, *sys.stdlib_module_names}


@pytest.mark.parametrize("folder", ["llm2clip_plugin/vision", "llava_integration"])
def test_what_llava_loads_needs_nothing_beyond_llavas_own(folder: str) -> None:
    foreign = {"pydantic", "rich", "webdataset", "fsspec", "bitsandbytes", "deepspeed"}
    for path in sorted(ROOT.glob(f"{folder}/**/*.py")):
        used = {name.split(".")[0] for name in imported(path, top_level_only=True)} & foreign
        assert not used, f"{path.relative_to(ROOT)} imports {used} at import time"
