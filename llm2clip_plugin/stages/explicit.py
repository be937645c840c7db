"""Options given on the command line: they win over what a recipe sets instead, and one without an effect is an error.

A setting of a recipe or a default may have no effect in a run, since it belongs to no choice of the user. An option
that was typed does: whoever gives --num_train_epochs 50 must not get the 100 steps of a recipe.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from llm2clip_plugin.options.names import Names

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


def value_of(config: Any, name: str) -> Any:
    """The value of a dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def make_room(default: Settings, given: Collection[str]) -> Settings:
    """``default`` without the settings that would take the place of a given option."""
    for option, replaced in REPLACES.items():
        if option in given and replaced not in given:
            default = _with(default, replaced.split("."), 0)
    return default


def _with(config: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _with(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: type(getattr(config, path[0]))(inner) if len(path) == 1 else inner})


def refuse_unused(config: Settings, given: Collection[str], rules: Iterable[Unused[Settings]], names: Names) -> None:
    """Raise ValueError that names every given option without an effect, and the setting that makes it so."""
    problems = []
    for rule in rules:
        if why := rule.why(config):
            for name in sorted(given):
                value = value_of(config, name)
                affected = any(name == option or name.startswith(f"{option}.") for option in rule.options)
                if affected and name not in rule.except_for and value and value != rule.off:
                    problems.append(f"{names.flag(name)} {value} has no effect: {why}")
    if problems:
        raise ValueError("\n  ".join(problems) + ("\nremove these options" if len(problems) > 1 else "; remove it"))


def _both_lengths(config: Any) -> str:
    steps = config.train.max_steps
    return f"max_steps {steps} decides the length" if steps > 0 else ""


def unused_in_training(given: Collection[str]) -> list[Unused[Any]]:
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
        Unused(
            ("allow_changed",), lambda c: "with --resume never, no checkpoint is read" if c.resume == "never" else ""
        ),
    ]
    if "train.max_steps" in given:
        rules.append(Unused(("train.num_train_epochs",), _both_lengths))
    return rules
