#!/usr/bin/env python3
"""Reads the environments' exact versions, ``scripts/environments/locked/NAME.txt``.

scripts/lock.sh runs it to write the versions of libraries that LLaVA was tried with. With --newer,
it prints what differs in the environment of this Python, for scripts/test.sh --newest."""

import json
import platform
import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "scripts" / "environments"
TRIED = ROOT / "llava_integration" / "plug" / "compat" / "tried.json"
LLAVA = ("pinned", "llava", "training")  # whose tests run LLaVA 1.5
LIBRARIES = ("transformers", "deepspeed")
CI_PYTHON = "3.11"


def requirements(file: Path) -> list[Requirement]:
    """What a list names, with what its lines ``# then OPTION... PACKAGE==VERSION`` add."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# then "):
            line = line.split()[-1]
        line = line.partition("#")[0].strip()
        if line:
            lines.append(Requirement(line))
    return lines


def versions(name: str, python: str = CI_PYTHON) -> dict[str, str]:
    """package -> its exact version in an environment that a Python makes on Linux."""
    markers = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    files = [ENVIRONMENTS / "locked" / f"{name}.txt"]
    if name != "training":
        files.append(ENVIRONMENTS / f"{name}.txt")
    found = {}
    for file in files:
        for requirement in requirements(file):
            exact = str(requirement.specifier).removeprefix("==")
            marker = requirement.marker
            if str(requirement.specifier).startswith("==") and (
                marker is None or marker.evaluate(markers)
            ):
                found[canonicalize_name(requirement.name)] = exact
    return found


def tried() -> dict[str, list[str]]:
    """library -> the versions with which the tests run LLaVA 1.5, in ascending order."""
    environments = [versions(name) for name in LLAVA]
    listed: dict[str, list[str]] = {library: [] for library in LIBRARIES}
    for environment in environments:
        for library, known in listed.items():
            if environment[library] not in known:
                known.append(environment[library])
    return listed


def newer() -> list[str]:
    """The packages of this Python whose version is not the training environment's."""
    exact = versions("training", ".".join(platform.python_version_tuple()[:2]))
    changed = []
    for distribution in distributions():
        name = canonicalize_name(distribution.name)
        # PyTorch's wheels for a CPU have a version of their own
        installed = distribution.version.partition("+")[0]
        if name in exact and installed != exact[name]:
            changed.append(f"{name} {exact[name]} -> {installed}")
    return sorted(changed)


def main() -> None:
    if "--newer" in sys.argv:
        print("\n".join(newer()) or "every package has the version of the list")
        return
    TRIED.write_text(json.dumps(tried(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
