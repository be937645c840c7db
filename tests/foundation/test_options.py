"""Options: their names, how words become settings, what is refused and how, and what --help
says."""

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from llm2clip_plugin import cli
from llm2clip_plugin.options import Command, section, setting


@dataclass(frozen=True, kw_only=True)
class Inner:
    """How it learns."""

    lr: float = setting(0.1, help="peak learning rate", also=("old-lr",))
    kind: Literal["fp32", "bf16"] = "fp32"
    name: str = "inner"
    flip: bool = setting(True, help="in two lines")
    bias: float | None = setting(None, help='"none": no bias')
    betas: tuple[float, float] = setting(
        (0.9, 0.99), help="two numbers", needs="not flip"
    )
    secret: int = setting(1, help="without an option")

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"lr {self.lr} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long."""

    wait: float = setting(0.0, help="pause", unit="seconds", replaces="tries")
    tries: int = setting(2, help="attempts", option="attempts")


@dataclass(frozen=True, kw_only=True)
class Outer:
    """All of it."""

    path: tuple[str, ...] = setting((), help="data to read", option="data")
    output_dir: str = setting("runs", help="where it goes", option="output")
    name: str = "outer"
    steps: int = setting(3, help="updates", alone="8")
    save: bool = setting(False, help="keep it", needs="path")
    inner: Inner = section(Inner(), hidden=("secret",))
    timing: Timing = section(
        Timing(),
        prefix="time.",
        needs_of={"tries": "save: without a file"},
        needs="steps",
    )


@dataclass(frozen=True, kw_only=True)
class Required:
    """One thing."""

    llm: str = setting(help="the LLM")
    path: Path = setting(help="folder of images", option="data")
    more: tuple[str, ...] = setting((), help="for another program")


COMMAND = Command(
    name="do",
    example="llm2clip do /data --steps 5",
    about="Does it.",
    settings=Outer,
    default=lambda extras: (
        Outer(steps=9, inner=Inner(kind="bf16")) if extras.get("recipe") else Outer()
    ),
    arguments="path",
    everyday="recipe steps lr",
    extras={"recipe": "where it starts"},
)
REQUIRED = Command(
    name="need",
    example="llm2clip need x",
    about="Needs.",
    settings=Required,
    arguments="path",
    rest="more",
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a b --steps 5", Outer(path=("a", "b"), steps=5)),
        (
            "--steps=5 a --lr 1e-2 b",
            Outer(path=("a", "b"), steps=5, inner=Inner(lr=0.01)),
        ),
        ("--data a b --inner.lr 2", Outer(path=("a", "b"), inner=Inner(lr=2))),
        (
            "--data_path a --output-dir x --old-lr 3",
            Outer(path=("a",), output_dir="x", inner=Inner(lr=3)),
        ),
        ("--time.wait 3", Outer(timing=Timing(wait=3, tries=0))),
        (
            "a --save --time.wait 3 --time.attempts 4",
            Outer(path=("a",), save=True, timing=Timing(wait=3, tries=4)),
        ),
        (
            "--steps -1 --name x --inner.name y",
            Outer(steps=-1, name="x", inner=Inner(name="y")),
        ),
        (
            "a --steps --no-flip --save",
            Outer(path=("a",), steps=8, save=True, inner=Inner(flip=False)),
        ),
        ("--inner.no-flip --save False", Outer(inner=Inner(flip=False))),
        (
            "--flip False --save true a",
            Outer(path=("a",), save=True, inner=Inner(flip=False)),
        ),
        ("--bias none --kind bf16", Outer(inner=Inner(kind="bf16"))),
        (
            "--betas 0 1 --no-flip --bias -1e-3",
            Outer(inner=Inner(betas=(0, 1), flip=False, bias=-0.001)),
        ),
        ("--local_rank=1 --data= --name=", Outer(name="")),
        (
            "--recipe small a --name -x",
            Outer(path=("a",), steps=9, name="-x", inner=Inner(kind="bf16")),
        ),
    ],
)
def test_words_become_settings(line: str, expected: Outer) -> None:
    assert COMMAND.parse(line.split()) == expected


def test_extras_and_the_words_after_two_dashes_are_kept_apart() -> None:
    values, extras = COMMAND.read(["--recipe", "small", "--lr", "2", "a"])
    assert extras == {"recipe": "small"}
    assert values == {"path": ("a",), "inner.lr": 2.0}
    config = REQUIRED.parse(["x", "--llm", "y", "--", "--help", "--other"])
    assert config == Required(llm="y", path=Path("x"), more=("--help", "--other"))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--lr -1", "lr -1.0"),
        ("--steps 1.5", "--steps: ... '1.5'"),
        (
            "--inner.no-flop",
            "unknown option --inner.no-flop (did you mean --inner.no-flip?)",
        ),
        ("--kind fp23", "--kind: ... 'fp23' ... 'fp32', 'bf16'"),
        ("--name --lr 1", "--name: "),
        ("--betas 1", "--betas: expected 2"),
        (
            "a --data b",
            "unexpected argument 'a'; usage: llm2clip do DATA [DATA ...] [options]",
        ),
        ("--save", "--save has no effect without DATA"),
        ("--betas 0 1", "--betas has no effect with --flip"),
        ("--time.attempts 4", "--time.attempts has no effect without a file"),
        ("--steps 0 --time.wait 4", "--time.wait has no effect without --steps"),
        ("--secret 2", "unknown option --secret"),
    ],
)
def test_a_refusal_is_one_line_that_names_the_option(line: str, named: str) -> None:
    with pytest.raises(ValueError) as refused:
        COMMAND.parse(line.split())
    assert all(part in str(refused.value) for part in named.split(" ... "))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", cli.OPTIONS)
def test_every_example_is_read(name: str) -> None:
    command: Command = cli.load(cli.OPTIONS[name])
    words = shlex.split(command.example)
    assert words[: 1 + len(name.split())] == ["llm2clip", *name.split()]
    assert isinstance(command.parse(words[1 + len(name.split()) :]), command.settings)


def test_help_has_units_and_the_names_that_are_declared() -> None:
    words = " ".join(COMMAND.help_text(everything=True).split())
    assert "--time.wait SECONDS pause (default: 0)" in words
    assert "--time.attempts N attempts (default: 2)" in words
    assert "--old-lr" not in words
    assert "secret" not in words


@pytest.mark.parametrize("name", cli.OPTIONS)
def test_every_option_says_what_it_is(name: str) -> None:
    command: Command = cli.load(cli.OPTIONS[name])
    silent = [field for field, leaf in command.leaves.items() if not leaf.setting.help]
    assert not silent, f"declare them with setting(..., help=...): {silent}"


@pytest.mark.parametrize("name", cli.OPTIONS)
def test_help_has_no_path_of_this_machine(name: str) -> None:
    command: Command = cli.load(cli.OPTIONS[name])
    installed = str(Path(cli.__file__).parents[1])
    assert installed not in command.help_text(everything=True)


def test_help_imports_nothing_large() -> None:
    code = (
        "import sys, llm2clip_plugin.cli as c\n"
        "for name in c.OPTIONS:\n"
        "    for flag in ('--help', '--help-all'):\n"
        "        try: c.read_options(name, [flag])\n"
        "        except SystemExit as ended: assert not ended.code\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'rich'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("example:\n") == 2 * len(cli.OPTIONS)
