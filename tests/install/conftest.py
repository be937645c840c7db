"""A copy of the checkout to install from, and empty environments to install into. Skipped without
uv or an index."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from empty_environment import ROOT, Environment, uv

NOT_OF_A_CHECKOUT = (
    ".git",
    ".venv*",
    ".*_cache",
    "__pycache__",
    "quickstart-output",
    "runs",
    "build",
    "dist",
)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout; skips where uv or a package index is missing."""
    folder = tmp_path_factory.mktemp("install") / "checkout"
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(*NOT_OF_A_CHECKOUT), symlinks=True
    )
    if find_spec("uv") is None:
        pytest.skip("uv is not installed in this environment (pip install uv)")
    version = uv("--version")
    assert version.returncode == 0, version.stderr
    empty = Environment(folder.parent / "empty", folder)
    tried = uv(
        "pip",
        "install",
        "--dry-run",
        "--refresh",
        "--python",
        empty.python,
        "iniconfig",
    )
    if tried.returncode:
        pytest.skip(
            f"no package index is reachable: {tried.stderr.strip().splitlines()[-1]}"
        )
    return folder


@pytest.fixture
def new_environment(checkout: Path, tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment", checkout)
