"""Every install command of README and docs works as printed, in an empty environment, from a copy
of the checkout.

Those of this package are run, and what they promise is tried. Those of other packages are resolved
against the index (``--dry-run``): vLLM alone is gigabytes.
"""

import re
import shlex
from pathlib import Path

import pytest
from empty_environment import ROOT, Environment, checks_data, compares, uv
from tiny_data import make_tower

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BASE = "."
TOWER = ".[tower]"
TRAIN = ".[train]"
LLAVA = "--no-deps llava-torch==1.2.2.post1"
MOST_MEGABYTES = 250  # of the base install, bytecode included
LOADS = (
    "import sys; from llm2clip_plugin import load_tower; "
    "print(load_tower(sys.argv[1]).config.hidden_size)"
)


def install_commands() -> list[str]:
    """What README and docs tell to install, each once: the arguments of ``pip install``."""
    commands: set[str] = set()
    for page in PAGES:
        for rest in re.findall(
            r"pip install([^`\n]*)", page.read_text(encoding="utf-8")
        ):
            command = re.split(r"\s#|&&|;\s", rest)[0]
            words = shlex.split(command)
            if any(not word.startswith("-") for word in words):
                commands.add(" ".join(words))
    return sorted(commands)


def is_ours(command: str) -> bool:
    return any(word.startswith(".") for word in command.split())


OTHERS = [command for command in install_commands() if not is_ours(command)]


def test_the_pages_install_this_package_in_three_ways() -> None:
    """A fourth one needs a test here. No page names an index, which has no such package yet."""
    assert [command for command in install_commands() if is_ours(command)] == [
        BASE,
        TOWER,
        TRAIN,
    ]
    assert not [command for command in OTHERS if "llm2clip-plugin" in command]
    assert LLAVA in OTHERS


@pytest.mark.parametrize("command", OTHERS)
def test_what_is_told_of_other_packages_can_be_installed(
    command: str, new_environment: Environment
) -> None:
    new_environment.install("--dry-run", *command.split())


def test_the_base_install_is_small_compares_and_checks_data(
    new_environment: Environment, tmp_path: Path
) -> None:
    """Then the command that another command prints, run as printed, adds what a tower needs."""
    new_environment.install("--compile-bytecode", BASE)
    size = new_environment.megabytes()
    assert size < MOST_MEGABYTES
    print(f"the base install has {size:.0f} MB")
    assert not new_environment.has("torch")
    assert not new_environment.has("transformers")
    compares(new_environment, tmp_path / "logs")
    checks_data(new_environment, tmp_path / "data")
    assert not new_environment.run("llm2clip", "doctor", folder=tmp_path).returncode
    hook = new_environment.run(
        "python", "-c", "import llava.model.builder", folder=tmp_path
    )
    assert (
        hook.stderr.strip().splitlines()[-1]
        == "ModuleNotFoundError: No module named 'llava'"
    )
    done = new_environment.run(
        "llm2clip", "export", "run", "--output", "out", folder=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    command = shlex.split(done.stderr.partition("install it: ")[2])
    assert command[:3] == ["uv", "pip", "install"]
    new_environment.install(*command[3:])
    assert new_environment.has("torch")
    assert not new_environment.has("deepspeed")


def test_the_extra_tower_opens_a_tower_and_names_the_other(
    new_environment: Environment, tmp_path: Path
) -> None:
    new_environment.install(TOWER)
    tower = make_tower(tmp_path / "tower")
    loaded = new_environment.run("python", "-c", LOADS, tower, folder=tmp_path)
    assert loaded.stdout.strip() == "32", loaded.stderr
    doctor = new_environment.run("llm2clip", "doctor", folder=tmp_path)
    assert "installed: base, tower\n" in doctor.stdout, doctor.stdout
    assert doctor.returncode == 0, doctor.stdout
    done = new_environment.run("llm2clip", "train-tower", "data", folder=tmp_path)
    assert done.returncode == 2
    assert "needs the extra [train]" in done.stderr


def test_the_extra_train_is_complete_with_llava(
    new_environment: Environment, tmp_path: Path
) -> None:
    new_environment.install(TRAIN)
    new_environment.install(*LLAVA.split())
    doctor = new_environment.run("llm2clip", "doctor", folder=tmp_path)
    assert "installed: base, tower, train\n" in doctor.stdout
    assert "[fail] C++" in doctor.stdout or doctor.returncode == 0, doctor.stdout
    done = new_environment.run("llm2clip", "train-tower", folder=tmp_path)
    assert done.stderr.startswith("error: no data"), done.stderr


@pytest.mark.parametrize("name", ["pinned", "llava"])
def test_in_llavas_environments_nothing_moves(name: str, checkout: Path) -> None:
    """Every version that the environment's list names is installed, and the extra asks for no
    other."""
    folder = ROOT / f".venv-{name}"
    if not (folder / "made-for").exists():
        pytest.skip(f"{folder.name} is not made here (scripts/test.sh)")
    frozen = uv(
        "pip", "freeze", "--python", folder / "bin" / "python"
    ).stdout.splitlines()
    versions = dict(line.split("==") for line in frozen if "==" in line)
    text = (ROOT / "scripts" / "environments" / f"{name}.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.M))
    assert "transformers" in pins
    assert {pin: versions[pin].partition("+")[0] for pin in pins} == pins
    plan = uv(
        "pip",
        "install",
        "--dry-run",
        "--python",
        folder / "bin" / "python",
        TOWER,
        folder=checkout,
    )
    assert plan.returncode == 0, plan.stderr
    moved = re.findall(r"^ [-+~] ([\w-]+)", plan.stderr, re.M)
    assert set(moved) <= {"llm2clip-plugin"}, plan.stderr
