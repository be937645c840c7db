"""Options given on the command line: they win over what a recipe sets instead, and one without an effect is an error.

A setting of a recipe or a default may have no effect in a run, since it belongs to no choice of the user. An option
that was typed does: whoever gives --num_train_epochs 50 must not get the 100 steps of a recipe.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Settings = TypeVar("Settings")

# An option that is given alone -> the setting that would take its place; that one is set to 0.
REPLACES = {
    "train.num_train_epochs": "train.max_steps",
    "optim.warmup_ratio": "optim.warmup_steps",
    "optim.warmup_steps": "optim.warmup_ratio",
}


@dataclass(frozen=True)
class Unused(Generic[Settings]):
    """Options that have no effect in some configurations."""

    options: tuple[str, ...]  # fields or sections, by dotted names
    why: Callable[[Settings], str]  # what makes them so in this configuration; "" if they have an effect
    except_for: tuple[str, ...] = ()  # fields of these sections that have one
    off: Any = None  # a value that asks for nothing, as 0, False, "" and () do


def given_options(kind: type, words: Sequence[str], *, sections: bool) -> set[str]:
    """The dotted names of the fields that a command line sets; words that name none are ignored.

    sections: options are --SECTION.FIELD, else --FIELD.
    """
    known = {name if sections else name.rpartition(".")[2]: name for name in field_names(kind)}
    given = set()
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            section, _, leaf = name.rpartition(".")
            positive = f"{section}{'.' if section else ''}{leaf.removeprefix('no_')}"  # --no-flip
            given |= {known[form] for form in (name, positive) if form in known}
    return given


def field_names(kind: type, path: str = "") -> Iterator[str]:
    """The dotted name of every leaf of nested dataclasses."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from field_names(hint, f"{path}{name}.")
        elif typing.get_origin(hint) is not typing.ClassVar:
            yield path + name


def value_of(config: Any, name: str) -> Any:
    """The value of a dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def make_room(default: Settings, given: set[str]) -> Settings:
    """``default`` without the settings that would take the place of a given option."""
    for option, replaced in REPLACES.items():
        if option in given and replaced not in given:
            default = _with(default, replaced.split("."), 0)
    return default


def _with(config: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _with(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: type(getattr(config, path[0]))(inner) if len(path) == 1 else inner})


def refuse_unused(config: Settings, given: set[str], rules: Iterable[Unused[Settings]], *, sections: bool) -> None:
    """Raise ValueError that names every given option without an effect, and the setting that makes it so."""
    problems = []
    for rule in rules:
        if why := rule.why(config):
            for name in sorted(given):
                value = value_of(config, name)
                affected = any(name == option or name.startswith(f"{option}.") for option in rule.options)
                if affected and name not in rule.except_for and value and value != rule.off:
                    problems.append(f"{flag(name, sections=sections)} {value} has no effect: {why}")
    if problems:
        raise ValueError("\n  ".join(problems) + ("\nremove these options" if len(problems) > 1 else "; remove it"))


def flag(name: str, *, sections: bool) -> str:
    """How a field is spelled on the command line."""
    return "--" + (name if sections else name.rpartition(".")[2]).replace("_", "-")


def _both_lengths(config: Any) -> str:
    steps = config.train.max_steps
    return f"max_steps {steps} decides the length" if steps > 0 else ""


def unused_in_training(given: set[str]) -> list[Unused[Any]]:
    """What both training stages have in common."""
    rules: list[Unused[Any]] = [
        Unused(
            ("optim.min_lr_ratio",),
            lambda c: (
                "optim.schedule constant never lowers the learning rate" if c.optim.schedule == "constant" else ""
            ),
        ),
        Unused(("train.profile_all_ranks",), lambda c: "" if c.train.profile_steps else "train.profile_steps is 0"),
        Unused(("plan",), lambda c: "" if c.dry_run else "it is an assumption of --dry-run"),
        Unused(("allow_changed",), lambda c: "--resume never resumes from nothing" if c.resume == "never" else ""),
    ]
    if "train.max_steps" in given:
        rules.append(Unused(("train.num_train_epochs",), _both_lengths))
    return rules
