"""The wheel and the source distribution are complete, and run from an empty folder."""

import subprocess
import tarfile
from pathlib import Path

import pytest
from empty_environment import ROOT, Environment, compares, uv

from llm2clip_plugin import __version__


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both; uv builds the wheel from the source distribution."""
    folder = tmp_path_factory.mktemp("built")
    done = uv("build", "--out-dir", folder, folder=checkout)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_runs_in_a_base_install(
    built: Path, new_environment: Environment, tmp_path: Path
) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < 2e6  # without the emoji
    new_environment.install(str(wheel))
    done = new_environment.run("llm2clip", "--version", folder=tmp_path)
    assert done.stdout == f"llm2clip {__version__}\n"
    compares(new_environment, tmp_path / "logs")


def test_the_source_distribution_is_the_checkout(built: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert tracked - names == set()
