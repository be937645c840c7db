"""Options: their names, how words become settings, what is refused and how, and what --help says."""

import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from llm2clip_plugin import cli
from llm2clip_plugin.options import Command


@dataclass(frozen=True, kw_only=True)
class Inner:
    """How it learns."""

    lr: float = 0.1  # peak learning rate
    kind: Literal["fp32", "bf16"] = "fp32"
    name: str = "inner"
    # above the field,
    # in two lines
    flip: bool = True
    bias: float | None = None  # "none": no bias
    betas: tuple[float, float] = (0.9, 0.99)  # two numbers

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"lr {self.lr} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Outer:
    """All of it."""

    path: tuple[str, ...] = ()  # data to read
    output_dir: str = "runs"  # where it goes
    name: str = "outer"
    steps: int = 3  # updates
    save: bool = False  # keep it
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True, kw_only=True)
class Required:
    """One thing."""

    llm: str  # the LLM
    path: Path  # folder of images
    more: tuple[str, ...] = ()  # for another program


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
    also={"old_lr": "inner.lr"},
    extras={"recipe": "where it starts"},
    alone={"steps": "8"},
    replaces={"inner.lr": "steps"},
    needs={"save": "path", "inner.betas": "not inner.flip"},
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
        ("--steps=5 a --lr 1e-2 b", Outer(path=("a", "b"), steps=5, inner=Inner(lr=0.01))),
        ("--data a b --inner.lr 2", Outer(path=("a", "b"), steps=0, inner=Inner(lr=2))),
        (
            "--data_path a --output-dir x --old-lr 3",
            Outer(path=("a",), steps=0, output_dir="x", inner=Inner(lr=3)),
        ),
        ("--steps -1 --name x --inner.name y", Outer(steps=-1, name="x", inner=Inner(name="y"))),
        (
            "a --steps --no-flip --save",
            Outer(path=("a",), steps=8, save=True, inner=Inner(flip=False)),
        ),
        ("--inner.no-flip --save False", Outer(inner=Inner(flip=False))),
        ("--flip False --save true a", Outer(path=("a",), save=True, inner=Inner(flip=False))),
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
        ("--inner.no-flop", "unknown option --inner.no-flop (did you mean --inner.no-flip?)"),
        ("--kind fp23", "--kind: ... 'fp23' ... 'fp32', 'bf16'"),
        ("--name --lr 1", "--name: "),
        ("--betas 1", "--betas: expected 2"),
        ("a --data b", "unexpected argument 'a'; usage: llm2clip do DATA [DATA ...] [options]"),
        ("--save", "--save has no effect without DATA"),
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


def test_help_imports_nothing_large() -> None:
    code = (
        "import sys, llm2clip_plugin.cli as c\n"
        "for name in c.OPTIONS:\n"
        "    for flag in ('--help', '--help-all'):\n"
        "        try: c.read_options(name, [flag])\n"
        "        except SystemExit as ended: assert not ended.code\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'rich'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("example:\n") == 2 * len(cli.OPTIONS)
