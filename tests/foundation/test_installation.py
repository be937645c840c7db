"""Without torch: what runs, and what names the extra that it needs and the command that installs
it."""

import json
import re
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from llm2clip_plugin import __version__, cli, doctor, installation
from llm2clip_plugin.installation import TOWER_MODULES, TRAIN_MODULES

INDEX = "pip install 'llm2clip-plugin[train]'"
GIT = {"vcs": "git", "commit_id": "1234abcd"}


ROOT = Path(__file__).parents[2]


def test_one_version_everywhere(capsys) -> None:
    """pyproject.toml takes it from the package."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llm2clip {__version__}\n"
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited
    assert cited[1] == __version__
    changes = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert changes
    assert changes[1] in (__version__, "Unreleased")


class Installed(Distribution):
    """A distribution with these files beside its metadata."""

    def __init__(self, **files: str):
        self.files_by_name = files

    def read_text(self, filename: str) -> str | None:
        return self.files_by_name.get(filename.partition(".")[0])

    def locate_file(self, path):
        raise NotImplementedError


@pytest.mark.parametrize(
    "record, command",
    [
        ({}, INDEX),
        ({"url": "file:///no/such/folder", "dir_info": {}}, INDEX),
        (
            {
                "url": "https://example.org/plugin.git",
                "vcs_info": {**GIT, "requested_revision": "v0.3.0"},
            },
            "pip install 'llm2clip-plugin[train] @ git+https://example.org/plugin.git@v0.3.0'",
        ),
        (
            {"url": "https://example.org/plugin.git", "vcs_info": GIT},
            "pip install 'llm2clip-plugin[train] @ git+https://example.org/plugin.git@1234abcd'",
        ),
        (
            {
                "url": "https://example.org/plugin-0.3.0-py3-none-any.whl",
                "archive_info": {},
            },
            "pip install 'llm2clip-plugin[train] @ https://example.org/plugin-0.3.0-py3-none-any.whl'",
        ),
    ],
    ids=["index", "checkout that is gone", "git, at a tag", "git", "wheel"],
)
def test_the_command_installs_from_where_this_package_came_from(
    record, command, monkeypatch
) -> None:
    texts = {"direct_url": json.dumps(record)} if record else {}
    monkeypatch.setattr(
        installation, "distribution", lambda name: Installed(INSTALLER="pip", **texts)
    )
    assert installation.install_command("train") == command


@pytest.mark.parametrize("editable", [False, True])
def test_the_command_names_the_checkout(editable, monkeypatch, tmp_path: Path) -> None:
    folder = tmp_path / "a checkout"
    folder.mkdir()
    record = {"url": folder.as_uri(), "dir_info": {"editable": editable}}
    installed = Installed(direct_url=json.dumps(record), INSTALLER="uv\n")
    monkeypatch.setattr(installation, "distribution", lambda name: installed)
    asked = (
        f"-e '{folder}[tower]'"
        if editable
        else f"'llm2clip-plugin[tower] @ {folder.as_uri()}'"
    )
    assert installation.install_command("tower") == f"uv pip install {asked}"


def test_the_command_without_a_record_names_this_checkout(monkeypatch) -> None:
    def none(name: str):
        raise installation.PackageNotFoundError(name)

    monkeypatch.setattr(installation, "distribution", none)
    root = Path(installation.__file__).parents[1].as_uri()
    assert installation.install_command() == f"pip install 'llm2clip-plugin @ {root}'"


LINES = """
Pillow>=9
llm2clip-plugin[tower]; extra == "train"
torch>=2.6; extra == "train"
deepspeed; extra == "train"
torch>=2.0; extra == "tower"
einops; extra == "tower"
"""


def test_an_extra_includes_another(monkeypatch) -> None:
    monkeypatch.setattr(installation, "requires", lambda name: LINES.split("\n")[1:-1])
    packages = {
        extra: sorted(installation.requirements(extra))
        for extra in ("", "tower", "train")
    }
    assert packages == {
        "": ["Pillow"],
        "tower": ["Pillow", "einops", "torch"],
        "train": ["Pillow", "deepspeed", "einops", "torch"],
    }
    assert str(installation.requirements("train")["torch"]) in (
        ">=2.0,>=2.6",
        ">=2.6,>=2.0",
    )
    assert [
        installation.extra_of(name) for name in ("torch", "deepspeed", "einops", "timm")
    ] == [
        "tower",
        "train",
        "tower",
        "",
    ]


# Run in a new process, in which the modules of argv[1] cannot be imported: every command of the
# table without options.
WITHOUT = """
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))
from llm2clip_plugin import cli
said = {}
for name in cli.COMMANDS:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            status = cli.main([*name.split(), *json.loads(sys.argv[2])])
        except SystemExit as ended:
            status = ended.code
    said[name] = [status, text.getvalue()]
import llava_integration.compare, llava_integration.boot
print(json.dumps(said))
"""


def run_without(modules: tuple[str, ...], *options: str) -> dict[str, list]:
    """Command -> its exit status and what it prints, where ``modules`` are not installed."""
    command = [sys.executable, "-c", WITHOUT, json.dumps(modules), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def without_torch() -> dict[str, list]:
    return run_without((*TOWER_MODULES, *TRAIN_MODULES, "scipy", "fsspec"))


def test_without_torch_each_command_names_its_extra_in_one_line(without_torch) -> None:
    assert cli.EXTRAS.keys() < cli.COMMANDS.keys()
    for name, extra in cli.EXTRAS.items():
        status, text = without_torch[name]
        assert status == 2
        assert text.startswith(
            f"error: `llm2clip {name}` needs the extra [{extra}] (torch, "
        )
        assert text.count("\n") == 1
        assert "pip install " in text
        assert f"[{extra}]" in text.partition("pip install")[2]


def test_without_torch_the_other_commands_run(without_torch) -> None:
    for name in cli.COMMANDS.keys() - cli.EXTRAS.keys() - {"doctor", "towers"}:
        status, text = without_torch[name]
        assert status == 2, name
        assert "error: missing " in text, name  # its options, which are read first


def test_without_torch_every_command_has_help() -> None:
    for name, (status, text) in run_without(
        (*TOWER_MODULES, *TRAIN_MODULES), "--help"
    ).items():
        assert status == 0
        assert f"usage: llm2clip {name} " in text


def test_with_the_extra_tower_training_names_the_other() -> None:
    said = run_without(TRAIN_MODULES)
    for name, extra in cli.EXTRAS.items():
        text = said[name][1]
        if extra == "train":
            assert text.startswith(
                f"error: `llm2clip {name}` needs the extra [train] (deepspeed, accelerate, peft not"
            )
        else:
            assert text.startswith("error: missing "), name


LLAVAS = {"llava-torch": "1.2.2.post1", "transformers": "4.37.2"}
PLUGIN = {"llm2clip-plugin": "0.3.0"}


@pytest.mark.parametrize(
    "versions, extra, is_own",
    [
        (PLUGIN, "", False),
        ({**PLUGIN, "torch": "2.0.1", "einops": "0.6.1"}, "tower", False),
        ({**PLUGIN, **LLAVAS}, "tower", True),
        (
            {**PLUGIN, **LLAVAS, "transformers": "5.24.0", "deepspeed": "0.19.8"},
            "train",
            False,
        ),
    ],
    ids=["base", "tower", "LLaVA's own", "train"],
)
def test_doctor_says_what_is_installed_and_how_to_add_the_rest(
    versions, extra, is_own, monkeypatch
) -> None:
    """In LLaVA's own environment the training's libraries would replace what LLaVA pins: never
    without a warning."""
    # without Pillow
    monkeypatch.setattr(installation, "requires", lambda name: LINES.split("\n")[2:-1])
    for module in (installation, doctor):
        monkeypatch.setattr(
            module, "installed_version", lambda package: versions.get(package, "")
        )
    monkeypatch.setattr(doctor, "is_importable", versions.__contains__)
    assert doctor.checked_extra() == extra
    lines = {line.subject: line for line in doctor.check_installation(extra)}
    parts = {"": "base", "tower": "base, tower", "train": "base, tower, train"}
    assert lines.pop("llm2clip-plugin").value == f"0.3.0, installed: {parts[extra]}"
    assert [*lines] == [
        f"extra [{name}]" for name in ("tower", "train") if name not in parts[extra]
    ]
    for name, line in lines.items():
        assert line.state == "ok"
        assert "pip install " in line.advice
        assert name[6:] in line.advice
        assert ("in a new environment" in line.value) == is_own
        assert is_own or (">=2.6" in line.value) == (name == "extra [train]")
    message = installation.missing_message("train", "this", ["peft"])
    assert ("in a new environment" in message) == is_own


def test_an_option_that_needs_more_names_the_extra(capsys, monkeypatch) -> None:
    def fails(name: str, argv: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'peft'", name="peft.tuners")

    monkeypatch.setattr(cli, "read_options", fails)
    assert cli.main(["compare"]) == 2
    text = capsys.readouterr().err
    assert "needs the extra [train] (peft not installed)" in text
    assert text.count("\n") == 1
