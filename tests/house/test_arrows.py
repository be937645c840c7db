"""The house keeps its arrows: who may import whom, and which heavy package has which home."""

import ast
import sys
from functools import cache
from pathlib import Path

import networkx
import pytest
from house import FLOORS, import_graph, imported_by_name, modules
from house import numbers as house

ROOT = Path(__file__).parents[2]

PACKAGE = "llm2clip_plugin"
HOMES = {  # heavy package -> the only places that may import it
    "deepspeed": {
        "llm2clip_plugin/train/engine.py",
        "llava_integration/plug/training.py",
    },
    "peft": {
        "llm2clip_plugin/text/",
        "llm2clip_plugin/vision/lora.py",
        "llava_integration/plug/compat/",
    },
    "bitsandbytes": {"llm2clip_plugin/text/", "llm2clip_plugin/train/optim.py"},
    "llava": {"llava_integration/"},
    "sentence_transformers": {
        "llm2clip_plugin/text/embedder_modules.py",
        "llm2clip_plugin/stages/embedder",
    },
    "vllm": {"llava_integration/serve/"},
}


@cache
def sources() -> list[Path]:
    return sorted(
        [*ROOT.glob("llm2clip_plugin/**/*.py"), *ROOT.glob("llava_integration/**/*.py")]
    )


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
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {
                node.module or ""
            }
        elif name := imported_by_name(node):
            names.add(name)
    return names


@pytest.mark.parametrize("call", ["importlib.import_module", "import_module"])
def test_an_import_by_name_is_seen(call: str) -> None:
    tree = ast.parse(f'{call}("torch")\n{call}(name)\nother("llava")')
    assert [name for node in ast.walk(tree) if (name := imported_by_name(node))] == [
        "torch"
    ]


def test_imports_follow_the_arrows_without_circles() -> None:
    rooms = {
        path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
        for path in sources()
        if PACKAGE in path.parts
    }
    assert {f"{PACKAGE}.{room}" for room in rooms - {"__init__"}} <= FLOORS.keys()
    assert [house(ROOT)[name] for name in ("arrows up", "files in import cycles")] == [
        "0",
        "0",
    ]
    # names by attribute only
    late = imported(ROOT / PACKAGE / "__init__.py", top_level_only=True)
    assert {name.split(".")[0] for name in late} <= {"importlib", "typing"}


@pytest.mark.parametrize("package, homes", HOMES.items(), ids=HOMES)
def test_heavy_packages_have_one_home(package: str, homes: set[str]) -> None:
    for path in sources():
        where = path.relative_to(ROOT).as_posix()
        uses = any(
            name == package or name.startswith(package + ".") for name in imported(path)
        )
        assert not uses or any(where.startswith(home) for home in homes), (
            f"{where} imports {package}; its home is {homes}"
        )


@pytest.fixture(scope="module")
def arrows() -> networkx.DiGraph:
    """From each module to those that it imports, anywhere in it."""
    return import_graph({name: ast.parse(text) for name, text in modules(ROOT).items()})


def test_a_plan_is_not_a_run(arrows: networkx.DiGraph) -> None:
    plan = [name for name in arrows if name.startswith(f"{PACKAGE}.plan.")]
    assert len(plan) > 2
    for name in plan:
        used = networkx.descendants(arrows, name)
        assert not used & {f"{PACKAGE}.train.engine", f"{PACKAGE}.train.loop"}, name
        assert not any(other.startswith(f"{PACKAGE}.stages") for other in used), name


@pytest.mark.parametrize("stage", ["tower", "llm"])
def test_a_run_knows_of_a_plan_only_its_memory(
    stage: str, arrows: networkx.DiGraph
) -> None:
    used = networkx.descendants(arrows, f"{PACKAGE}.stages.{stage}")
    of_plan = {name for name in used if name.startswith(f"{PACKAGE}.plan")}
    assert of_plan <= {f"{PACKAGE}.plan.memory"}
    assert not any(name.endswith("_dry_run") for name in used)


def test_what_reads_files_and_options_is_standard_library_only() -> None:
    paths = [
        ROOT / PACKAGE / f"{name}.py"
        for name in ("contracts", "json_files", "outside", "run_folder")
    ]
    for path in (*paths, *(ROOT / PACKAGE / "options").glob("*.py")):
        names = imported(path, top_level_only=True)
        assert {name.split(".")[0] for name in names} <= {
            PACKAGE,
            *sys.stdlib_module_names,
        }


@pytest.mark.parametrize("folder", ["llm2clip_plugin/vision", "llava_integration"])
def test_what_llava_loads_needs_nothing_beyond_llavas_own(folder: str) -> None:
    foreign = {"pydantic", "rich", "webdataset", "fsspec", "bitsandbytes", "deepspeed"}
    for path in sorted(ROOT.glob(f"{folder}/**/*.py")):
        used = {
            name.split(".")[0] for name in imported(path, top_level_only=True)
        } & foreign
        assert not used, f"{path.relative_to(ROOT)} imports {used} at import time"
