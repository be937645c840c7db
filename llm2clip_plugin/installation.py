"""What of this package is installed, and the command that installs more of it.

The base install has what ``llm2clip compare`` needs, and no torch. The extra ``tower`` adds what
opens a tower, also in LLaVA's environment; ``train`` adds the rest. Needs the standard library, and
``packaging`` to read requirements.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from importlib.metadata import (
    Distribution,
    PackageNotFoundError,
    distribution,
    requires,
    version,
)
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

NAME = "llm2clip-plugin"
# extra -> what it is for
ADDS = {"tower": "opening and exporting towers, LLaVA", "train": "training"}
# What an extra's commands import at once. Others of its packages serve single options, and are
# missed only there.
TOWER_MODULES = ("torch", "transformers", "safetensors", "einops", "huggingface_hub")
TRAIN_MODULES = ("deepspeed", "accelerate", "peft")
MODULES = {"tower": TOWER_MODULES, "train": TOWER_MODULES + TRAIN_MODULES}


class MissingExtraError(ImportError):
    """The base install, or another extra, was asked for what an extra brings."""


def missing_modules(extra: str) -> list[str]:
    """The modules of an extra that this environment lacks; nothing is imported."""
    return [name for name in MODULES[extra] if not is_importable(name)]


def is_importable(module: str) -> bool:
    """Whether a top-level module would be found; nothing is imported."""
    try:
        return find_spec(module) is not None
    except ValueError:  # put into sys.modules by hand, or None there
        return False


def require(extra: str, what: str) -> None:
    """Raise MissingExtraError if modules of ``extra`` are missing; ``what`` needs them."""
    missing = missing_modules(extra)
    if missing:
        raise MissingExtraError(missing_message(extra, what, missing))


def missing_message(extra: str, what: str, modules: list[str]) -> str:
    """One line: what needs the extra, what is missing, the command that installs it."""
    named = ", ".join(modules[:3]) + (" ..." if len(modules) > 3 else "")
    where = ""
    if extra == "train" and is_llavas_own():
        where = " in a new environment, since it would move what LLaVA pins here"
    return (
        f"{what} needs the extra [{extra}] ({named} not installed); install it{where}: "
        f"{install_command(extra)}"
    )


def is_llavas_own() -> bool:
    """Whether this environment has LLaVA 1.5 with libraries of its time, which the extra ``train``
    would replace."""
    if not installed_version("llava-torch") and not installed_version("llava"):
        return False
    major = installed_version("transformers").partition(".")[0]
    return not major or int(major) < 5


def installed_version(package: str) -> str:
    """The version of an installed distribution, "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def extra_of(module: str) -> str:
    """The smallest extra that brings a module; "" if none does, or the base install does."""
    if module in TOWER_MODULES:
        return "tower"
    if module in TRAIN_MODULES:
        return "train"
    for extra in ADDS:
        if module in requirements(extra) and module not in requirements(""):
            return extra
    return ""


def requirements(extra: str) -> dict[str, SpecifierSet]:
    """Package -> versions that the base install and ``extra`` ask for; empty where this package is
    not installed."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        lines = requires(NAME) or []
    except PackageNotFoundError:
        return {}
    needed: dict[str, SpecifierSet] = {}
    for wanted in map(Requirement, lines):
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        parts = {wanted.name: wanted.specifier}
        # an extra that includes another names this package
        if wanted.name == NAME:
            parts = requirements(next(iter(wanted.extras)))
        for name, versions in parts.items():
            needed[name] = needed.get(name, SpecifierSet()) & versions
    return needed


def install_command(extra: str = "") -> str:
    """The command that installs this package with an extra from where it came from: a checkout, a
    file, a repository (PEP 610's direct_url.json), or an index."""
    try:
        installed = distribution(NAME)
    except PackageNotFoundError:
        return "pip install " + requirement(extra, checkout())
    installer = (installed.read_text("INSTALLER") or "").strip()
    tool = "uv pip install" if installer == "uv" else "pip install"
    return f"{tool} {requirement(extra, origin(installed))}"


def requirement(extra: str, where: str) -> str:
    """The arguments of ``pip install``; ``where``: a URL, ``-e FOLDER``, or "" for an index."""
    chosen = f"[{extra}]" if extra else ""
    if where.startswith("-e "):
        return f"-e {shlex.quote(where.removeprefix('-e ') + chosen)}"
    return shlex.quote(f"{NAME}{chosen} @ {where}" if where else NAME + chosen)


def origin(installed: Distribution) -> str:
    """Where a distribution was installed from, as ``requirement`` takes it. "" for an index, or if
    the folder or file is gone."""
    record = json.loads(installed.read_text("direct_url.json") or "{}")
    url = record.get("url", "")
    if repository := record.get("vcs_info"):
        revision = repository.get("requested_revision") or repository["commit_id"]
        return f"{repository['vcs']}+{url}@{revision}"
    if not url.startswith("file:"):
        return url
    path = url2pathname(urlsplit(url).path)
    if not os.path.exists(path):
        return ""
    return f"-e {path}" if record.get("dir_info", {}).get("editable") else url


def checkout() -> str:
    """The URL of the checkout that this file belongs to; "" elsewhere."""
    root = Path(__file__).resolve().parents[1]
    return root.as_uri() if (root / "pyproject.toml").is_file() else ""


def numbers(text: str) -> tuple[int, ...]:
    """``'2.13.0+cpu'`` -> (2, 13, 0), for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])
