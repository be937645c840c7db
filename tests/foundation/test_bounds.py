"""Numbers that no run can mean are refused as options are read, in one line that says what is
expected."""

import types
import typing
from typing import Any

import pytest

from llm2clip_plugin import bounds, cli
from llm2clip_plugin.bounds import BOUNDS, check_number, most_processes
from llm2clip_plugin.options import Command, leaves_of


def numbers_in(hint: Any) -> set[type]:
    """int, float or both, if a field's type has them, also in a tuple or as an optional value."""
    if typing.get_origin(hint) in (tuple, typing.Union, types.UnionType):
        return {
            kind
            for argument in typing.get_args(hint)
            if argument is not Ellipsis
            for kind in numbers_in(argument)
        }
    return {hint} & {int, float}


def numeric_options(name: str) -> list[tuple[Command[Any], str, type, int]]:
    """Of a command: it, the option, its type, how many values it takes."""
    command: Command[Any] = cli.load(cli.OPTIONS[name])
    options = []
    for field, leaf in command.leaves.items():
        arguments = (
            typing.get_args(leaf.type)
            if typing.get_origin(leaf.type) is tuple
            else ("one",)
        )
        count = 1 if arguments[-1] is Ellipsis else len(arguments)
        options += [
            (command, f"--{command.options[field]}", kind, count)
            for kind in numbers_in(leaf.type)
        ]
    return options


@pytest.mark.parametrize("name", cli.OPTIONS)
def test_every_command_refuses_numbers_beyond_all_numbers(name: str):
    for command, option, kind, count in numeric_options(name):
        bad = (
            ("nan", "inf", "-inf", "1e400")
            if kind is float
            else (str(2**70), str(-(2**70)), "1e9", "nan")
        )
        for text in bad:
            words = [f"{option}={text}"] if count == 1 else [option, *[text] * count]
            with pytest.raises(ValueError, match=f"^{option}: '?{text}'? ") as refused:
                command.read(words)
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_bounds_end_where_they_say(name: str):
    low, high = BOUNDS[name]
    check_number("--x", f"section.{name}", low)
    check_number("--x", f"section.{name}", (low, high))
    for outside in (low - 1, high + 1 if high < 2**62 else 2**64):
        with pytest.raises(ValueError, match=r"--x .* is out of range; expected "):
            check_number("--x", f"section.{name}", outside)


def test_defaults_are_within_the_bounds():
    for name in cli.OPTIONS:
        command: Command[Any] = cli.load(cli.OPTIONS[name])
        for field, leaf in leaves_of(
            command.settings,
            command.default({}) if command.default else bounds_missing(),
        ):
            check_number(f"{name} --{field}", field, leaf.default)


def bounds_missing() -> Any:
    """What leaves_of takes for fields' own defaults."""
    return typing.cast(Any, leaves_of.__defaults__)[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "train-tower data --seed -1",
            "--seed -1 is out of range; expected 0 to 9223372036854775807",
        ),
        (
            "train-tower data --num-train-epochs 1e7",
            "--num-train-epochs 10000000.0 is out of range; expected 0 to 1000000",
        ),
        (
            "train-tower data --max-steps -5",
            "--max-steps -5 is out of range; expected -1 to 2147483647",
        ),
        (
            "train-tower data --betas 0.9 3",
            "--betas 3.0 is out of range; expected 0 to 1",
        ),
        (
            "train-tower data --workers 100000",
            "--workers 100000 is out of range; expected 0 to",
        ),
        (
            "train-tower data --dataloader_num_workers 100000",
            "--workers 100000 is out of range; expected 0 to",
        ),
        (
            "finetune-llm data --llm x --micro-batch 10000000000",
            "--micro-batch 10000000000 is out of range",
        ),
        (
            "embed data --llm x --layer 1000000000",
            "--layer 1000000000 is out of range; expected -1024 to 1024",
        ),
        (
            "embed data --llm x --tokens-per-batch -1",
            "--tokens-per-batch -1 is out of range",
        ),
        (
            "evaluate tower data --batch-size 0",
            "--batch-size 0 is out of range; expected 1 to 1048576",
        ),
        ("evaluate tower data --limit -5", "--limit -5 is out of range"),
        (
            "data check data --workers 100000",
            "--workers 100000 is out of range; expected 0 to",
        ),
        (
            "data check data --max-broken 2",
            "--max-broken 2.0 is out of range; expected 0 to 1",
        ),
        ("data check data --cache-gb 1e300", "--cache-gb 1e+300 is out of range"),
        (
            "bench-mllm data --model-path x --output y --gpus 100000",
            "--gpus 100000 is out of range; expected 0 to",
        ),
    ],
)
def test_commands_refuse_absurd_numbers(line: str, message: str):
    name = next(
        name
        for name in sorted(cli.OPTIONS, key=len, reverse=True)
        if line.startswith(f"{name} ")
    )
    command: Command[Any] = cli.load(cli.OPTIONS[name])
    with pytest.raises(ValueError) as refused:
        command.parse(line.removeprefix(name).split())
    assert str(refused.value).startswith(message)


def test_processes_are_bounded_by_cores_and_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bounds, "cores", lambda: 64)
    monkeypatch.setattr(bounds, "memory", lambda: 512 * bounds.GIB)
    assert most_processes() == 256
    monkeypatch.setattr(bounds, "memory", lambda: 16 * bounds.GIB)
    assert most_processes() == 64
    monkeypatch.setattr(bounds, "cores", lambda: 1)
    assert most_processes() == 8
    expected = (
        r"--workers 9 is out of range; expected 0 to 8 on this machine, "
        r"with 1 cores and 16.0 GiB of memory"
    )
    with pytest.raises(ValueError, match=expected):
        check_number("--workers", "train.dataloader_num_workers", 9)


def test_the_command_ends_with_one_line_before_it_reads(
    tmp_path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "table.csv").write_text("image,caption\n")
    assert cli.main(["data", "check", str(tmp_path), "--workers", "100000"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: --workers 100000 is out of range; expected 0 to "
    )


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("train-tower", "precision of weights; optimizer state stays fp32"),
        (
            "train-tower",
            "pairs per forward pass and GPU; 0: all at once. Smaller values use gradient caching",
        ),
        ("train-tower", "output folder (checkpoints, metrics, exported tower)"),
        ("train-tower", "DeepSpeed JSON; default ZeRO-1, or ZeRO-0 with fp32"),
        ("run", "existing LoRA adapter; skips stage 1"),
        ("bench-mllm", "lmms-eval task names; default: nine standard tasks"),
    ],
)
def test_help_says_what_an_option_is(name: str, row: str):
    command: Command[Any] = cli.load(cli.OPTIONS[name])
    assert row in " ".join(command.help_text(everything=True).split())


def test_compare_says_which_number_it_expects():
    command: Command[Any] = cli.load(cli.OPTIONS["compare"])
    with pytest.raises(
        ValueError, match=r"^--effect 0\.0 is invalid; expected a number above 0$"
    ):
        command.parse(["a", "--plan", "--effect", "0"])
    with pytest.raises(
        ValueError, match=r"^--runs 0 2 is invalid; expected whole numbers above 0$"
    ):
        command.parse(["a", "--plan", "--runs", "0", "2"])
