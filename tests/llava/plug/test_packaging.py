"""Installed next to LLaVA: nothing moves, every process knows the tower; uninstalled, nothing is
left.

The scratch environment holds links to everything of this one except our own package.
"""

import json
import subprocess
import sysconfig
import venv
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from llm2clip_plugin.installation import requirements

ROOT = Path(__file__).parents[3]
OURS = ("llm2clip", "_editable_impl_llm2clip", "__editable__", "__pycache__")
KNOWS = (
    "from llava.model.llava_arch import build_vision_tower as "
    "b; print(hasattr(b, '__wrapped__'))"
)


class Scratch:
    """A virtual environment with LLaVA and without us."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=True)
        self.python = folder / "bin" / "python"
        self.site = Path(
            self.run(
                "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"
            ).strip()
        )
        present = {entry.name for entry in self.site.iterdir()}
        for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
            if (
                not entry.name.startswith(OURS)
                and entry.name not in present
                and not entry.name.startswith("pip")
            ):
                (self.site / entry.name).symlink_to(entry)

    def run(self, *words: str | Path) -> str:
        """Run its Python and return what it prints."""
        command = [str(self.python), *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.python.parent, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pip(self, *words: str | Path) -> str:
        """Run its pip."""
        return self.run("-m", "pip", "-q", "--disable-pip-version-check", *words)

    def knows(self) -> bool:
        """Whether a process that imports only llava knows our tower."""
        return self.run("-c", KNOWS).strip().endswith("True")

    def files(self) -> set[str]:
        """Names in site-packages."""
        return {
            entry.name for entry in self.site.iterdir() if entry.name != "__pycache__"
        }


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return Scratch(tmp_path_factory.mktemp("scratch") / "venv")


@pytest.fixture(scope="module")
def wheel(scratch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    scratch.pip("wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    (file,) = folder.glob("*.whl")
    return file


def test_wheel_is_pure_python_and_holds_the_hook(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "llm2clip_llava.pth" in names
    assert "llava_integration/boot.py" in names
    assert {
        f"llava_integration/evaluator/compare/page.{kind}"
        for kind in ("html", "css", "js")
    } <= set(names)
    ours = {"llava_integration", "llm2clip_plugin", "llm2clip_llava.pth"}
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == ours


def test_installing_it_moves_nothing(scratch, wheel, tmp_path):
    """pip would install our package alone; then it does, and every other version stays."""
    report = tmp_path / "report.json"
    scratch.pip(
        "install", "--dry-run", "--no-index", "--report", report, f"{wheel}[tower]"
    )
    planned = [
        item["metadata"]["name"] for item in json.loads(report.read_text())["install"]
    ]
    assert planned == ["llm2clip-plugin"]
    before = scratch.pip("freeze").splitlines()
    files = scratch.files()
    assert not scratch.knows()
    scratch.pip("install", "--no-deps", wheel)
    after = scratch.pip("freeze").splitlines()
    assert (
        [line for line in after if not line.startswith("llm2clip-plugin")]
        == before
        != after
    )
    assert scratch.knows()
    assert "llm2clip use" in scratch.run("-m", "llm2clip_plugin.cli", "use", "--help")
    scratch.pip("uninstall", "-y", "llm2clip-plugin")
    assert scratch.files() == files
    assert not scratch.knows()


def test_llavas_own_pins_satisfy_us():
    """With the exact versions that LLaVA's wheel asks for, pip has nothing to change either."""
    pins = {}
    for line in requires("llava-torch") or []:
        requirement = Requirement(line)
        exact = [
            clause.version
            for clause in requirement.specifier
            if clause.operator == "=="
        ]
        if exact and requirement.marker is None:
            pins[requirement.name.lower()] = exact[0]
    asked = requirements("tower")
    assert {"torch", "transformers"} <= set(asked) & set(pins)
    for name in set(asked) & set(pins):
        assert asked[name].contains(pins[name]), (
            f"{name} {pins[name]} does not satisfy {asked[name]}"
        )
