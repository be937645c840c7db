"""Options: their names, how words become settings, what is refused and how, and what --help says."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from llm2clip_plugin import cli
from llm2clip_plugin.options import ALSO, Command, Extra, Names, Parser, add_data, data_of, help_text
from llm2clip_plugin.stages.tower.command import read_command


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
    betas: tuple[float, float] = (
        0.9,
        0.99,
    )  # two numbers

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
    path: str  # folder of images


COMMAND = Command(
    name="do",
    example="llm2clip do /data --steps 5",
    about="Does it.",
    settings=Outer,
    arguments=("path",),
    everyday=("recipe", "steps", "inner.lr"),
    shown={"path": "data", "output_dir": "output"},
    also={"old_lr": "inner.lr"},
    extras={"recipe": Extra(metavar="NAME", help="where it starts")},
)
REQUIRED = Command(
    name="need",
    example="llm2clip need x",
    about="Needs.",
    settings=Required,
    arguments=("path",),
    shown={"path": "data"},
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a b --steps 5", Outer(path=("a", "b"), steps=5)),
        ("--steps=5 a --lr 1e-2 b", Outer(path=("a", "b"), steps=5, inner=Inner(lr=0.01))),
        ("--data a b --inner.lr 2", Outer(path=("a", "b"), inner=Inner(lr=2))),
        ("--data_path a --output-dir x --old-lr 3", Outer(path=("a",), output_dir="x", inner=Inner(lr=3))),
        ("--output_dir x --learning_rate 3", Outer(output_dir="x", inner=Inner(lr=3))),
        ("--steps -1 --name x --inner.name y", Outer(steps=-1, name="x", inner=Inner(name="y"))),
        ("--no-flip --save", Outer(save=True, inner=Inner(flip=False))),
        ("--inner.no-flip --save False", Outer(inner=Inner(flip=False))),
        ("--flip False --save true a", Outer(path=("a",), save=True, inner=Inner(flip=False))),
        ("--bias none --betas 0 1 --kind bf16", Outer(inner=Inner(betas=(0, 1), kind="bf16"))),
        ("--bias -10", Outer(inner=Inner(bias=-10.0))),
        ("--local_rank=1 --data=", Outer()),
        ("--name=", Outer(name="")),
    ],
)
def test_words_become_settings(line: str, expected: Outer) -> None:
    assert COMMAND.parse(line.split()) == expected


def test_help_shows_the_values_of_a_plain_run(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["train-tower", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    plain = read_command(["x", "--tower", "y"])
    assert (plain.train.global_batch, plain.train.precision) == (256, "bf16")
    assert f"(default: {plain.train.global_batch})" in text and f"(default: {plain.train.precision})" in text
    assert f"(default: {plain.optim.lr:g})" in text and "4096" not in text


def test_options_override_a_default_and_extras_are_kept_apart() -> None:
    words = COMMAND.read(["--recipe", "small", "--lr", "2", "a"])
    start = Outer(steps=9, inner=Inner(kind="bf16"))
    assert COMMAND.build(words, start) == Outer(path=("a",), steps=9, inner=Inner(lr=2.0, kind="bf16"))
    assert words.extras == {"recipe": "small"} and set(words.values) == {"path", "inner.lr"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lr -1", "lr -1.0 must not be negative"),
        ("--lr x", "--lr 'x' is not a number"),
        ("--steps 1.5", "--steps '1.5' is not an integer"),
        ("--lrr 1", "unknown option --lrr; did you mean --lr? `llm2clip do --help-all` lists all"),
        ("--learning_rat 1", "unknown option --learning_rat; did you mean --lr? `llm2clip do --help-all` lists all"),
        ("--no-steps", "unknown option --no-steps; did you mean --steps? `llm2clip do --help-all` lists all"),
        ("--kind fp8", "--kind 'fp8' is not one of fp32, bf16"),
        ("--kind fp23", "--kind 'fp23' is not one of fp32, bf16; did you mean 'fp32'?"),
        ("--steps", "--steps needs a value"),
        ("--steps --lr 1", "--steps needs a value"),
        ("--betas 1", "--betas takes 2 values; got 1"),
        ("a --data b", "unexpected argument 'a'; usage: llm2clip do DATA [DATA ...] [options]"),
    ],
)
def test_a_refusal_is_one_line(line: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        COMMAND.parse(line.split())
    assert str(refused.value) == message


def test_what_is_missing_is_named() -> None:
    for words, name in ((["--llm", "x"], "DATA"), (["x"], "--llm")):
        with pytest.raises(ValueError, match=rf"^{name} is missing; usage: llm2clip need DATA \[options\]$"):
            REQUIRED.parse(words)
    with pytest.raises(ValueError, match="unexpected argument 'b'"):
        REQUIRED.parse(["a", "b", "--llm", "x"])


def test_help_shows_an_example_and_the_options_of_every_day(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        COMMAND.parse(["--steps", "--help"])
    assert not ended.value.code
    text = capsys.readouterr().out
    assert text.startswith("example:\n  llm2clip do /data --steps 5\n\nusage: llm2clip do DATA [DATA ...] [options]\n")
    for line in ("DATA                        data to read", "--recipe NAME               where it starts"):
        assert f"\n  {line}\n" in text
    assert "--lr NUMBER                 peak learning rate (default: 0.1)" in text and "--kind" not in text
    assert "`llm2clip do --help-all` lists 8 more options." in text


def test_all_options_are_listed_by_section_with_their_comments() -> None:
    text = help_text(COMMAND, everything=True)
    for line in (
        "How it learns:",
        "--flip, --no-flip           above the field, in two lines",
        "--kind fp32|bf16            (default: fp32)",
        "--betas NUMBER NUMBER       two numbers (default: 0.9 0.99)",
        '--bias NUMBER               "none": no bias',
        "--save                      keep it",
    ):
        assert line in text, text


def test_names_are_the_last_part_unless_two_fields_end_in_it() -> None:
    names = Names(["a.x", "b.x", "b.y_z", "c.w"], {"c": "see."}, {})
    assert [names.flag(name) for name in names.shown] == ["--a.x", "--b.x", "--y-z", "--see.w"]
    assert {name: names.fields[name] for name in ("b.y-z", "y-z", "c.w", "w", "see.w")} == {
        "b.y-z": "b.y_z", "y-z": "b.y_z", "c.w": "c.w", "w": "c.w", "see.w": "c.w"
    }  # fmt: skip
    assert "x" not in names.fields
    assert not set(ALSO) & set(ALSO.values())


def parsed(line: str) -> tuple[object, ...]:
    parser = small_parser()
    options = parser.parse_args(line.split())
    return options.kind, data_of(parser, options), options.output, options.image_folder


def small_parser() -> Parser:
    parser = Parser("p", "llm2clip p x", "A parser.", also={"json": "output"}, rare=("image-folder", "size"))
    parser.add_argument("kind", metavar="KIND", choices=("k", "kind"), help="which")
    add_data(parser, "images")
    parser.add_argument("--output", help="file to write")
    parser.add_argument("--image-folder", help="where images are")
    parser.add_argument("--size", type=int)
    return parser


def test_parsers_of_llava_s_commands_know_the_same_names(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (
        "k d --output o --image-folder i",
        "k --json=o --image_folder i --data d",
        "k --output_dir o d --image-folder i",
    ):
        assert parsed(line) == ("k", "d", "o", "i")
    for line, message in (
        ("k d --outputt x", "unknown option --outputt; did you mean --output?"),
        ("k d e", "unknown argument e"),
        ("k", "DATA is missing"),
        ("kin d", "KIND 'kin' is not one of k, kind; did you mean 'kind'?"),
        ("k d --data e", "DATA is given twice: d and e"),
    ):
        with pytest.raises(SystemExit) as ended:
            parsed(line)
        error = capsys.readouterr().err
        joint = "" if message.endswith("?") else ";"
        assert ended.value.code == 2 and error == f"error: {message}{joint} `llm2clip p --help-all` lists the options\n"


def test_a_parser_s_help_leaves_out_the_rare_options(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for words in (["k", "--help"], ["--help_all"], ["k", "-h", "--", "--size"]):
        with pytest.raises(SystemExit) as ended:
            small_parser().read(words)
        assert not ended.value.code
        shown.append(capsys.readouterr().out)
    short, everything, again = shown
    assert short == again and short.startswith("example:\n  llm2clip p x\n\nusage: llm2clip p KIND DATA [options]\n\n")
    assert "\n  KIND             which\n" in short and "\n  --output OUTPUT  file to write\n" in short
    assert "--image-folder" not in short and short.endswith("`llm2clip p --help-all` lists 2 more options.\n")
    assert (
        "--image-folder IMAGE_FOLDER" in everything and "--size SIZE" in everything and "more options" not in everything
    )


def test_help_imports_nothing_large() -> None:
    code = (
        "import sys, llm2clip_plugin.cli as c\n"
        "for name in c.OPTIONS:\n"
        "    for flag in ('--help', '--help-all'):\n"
        "        try: c.read_options(name, [flag])\n"
        "        except SystemExit as ended: assert not ended.code\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'numpy', 'PIL', 'rich'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("example:\n") == 2 * len(cli.OPTIONS)
