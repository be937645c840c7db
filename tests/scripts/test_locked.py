"""The lists of exact versions hold what pyproject.toml and scripts/environments/*.txt ask for."""

import importlib.util
import json
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SPEC: Any = importlib.util.spec_from_file_location(
    "locked", ROOT / "scripts" / "locked.py"
)
locked: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(locked)
PACKAGE = "llm2clip-plugin"
NAMES = sorted(file.stem for file in (ROOT / "scripts" / "environments").glob("*.txt"))


def of_extras(*extras: str) -> list[Requirement]:
    """What the package asks for with extras, and those that these name in turn."""
    found = []
    for line in requires(PACKAGE) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if requirement.name == PACKAGE:
            found += of_extras(*requirement.extras)
        else:
            found.append(requirement)
    return found


def not_held(name: str, asked: list[Requirement]) -> list[str]:
    """What the list of an environment leaves out, or has in a version that is not asked for."""
    environment = {"python_version": locked.CI_PYTHON, "extra": ""}
    versions = locked.versions(name)
    missing = []
    for requirement in asked:
        marker = requirement.marker
        if marker and "extra" not in str(marker) and not marker.evaluate(environment):
            continue
        version = versions.get(locked.canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version):
            missing.append(f"{requirement}: {version}")
    return missing


def test_the_training_environment_has_what_the_package_asks_for() -> None:
    assert not not_held("training", of_extras("train", "dev"))


@pytest.mark.parametrize("name", NAMES)
def test_an_environment_has_what_its_list_asks_for(name: str) -> None:
    asked = locked.requirements(locked.ENVIRONMENTS / f"{name}.txt")
    assert not not_held(name, asked + of_extras("tower"))


def test_a_version_that_is_not_asked_for_is_seen() -> None:
    assert not_held("llava", [Requirement("transformers>=5"), Requirement("unknown")])[
        0
    ] == ("transformers>=5: 4.37.2")


def test_no_list_names_what_only_one_kind_of_machine_has() -> None:
    for file in (locked.ENVIRONMENTS / "locked").glob("*.txt"):
        for requirement in locked.requirements(file):
            assert "+" not in str(requirement.specifier), f"{file}: {requirement}"
            assert not requirement.name.startswith("nvidia"), f"{file}: {requirement}"


def test_the_versions_that_llava_was_tried_with_are_those_of_the_lists() -> None:
    assert json.loads(locked.TRIED.read_text()) == locked.tried()
