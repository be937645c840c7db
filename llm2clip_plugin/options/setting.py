"""How a setting is declared: a field of a dataclass that says everything about itself, once.

``setting`` is a field with a value, ``section`` one that holds the settings of another dataclass.
From what they declare follow the option and its --help (command.py), what a resumed run may change
and what hosts must have in common (stages/resume.py).

The name of another setting, in ``needs`` or ``replaces``, is relative to the dataclass that
declares it: a setting names its neighbors, a section names settings of the whole.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from llm2clip_plugin.json_files import default_of

Value = TypeVar("Value")
REQUIRED: Any = MISSING  # the default of a setting that must be given
KEY = "setting"  # of a field's metadata
NOTHING: Mapping[str, str] = MappingProxyType({})


class Need(NamedTuple):
    """Another setting, without which, or with which, an option has no effect."""

    setting: str
    absent: bool  # the other setting must not be set
    reason: str  # how an error says it; "": with or without the other setting

    @classmethod
    def parse(cls, text: str) -> "Need":
        """``NAME`` or ``not NAME``; the reason may follow after ": "."""
        condition, _, reason = text.partition(": ")
        return cls(condition.removeprefix("not "), condition.startswith("not "), reason)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a field declares besides its type and its default; see ``setting``."""

    help: str = ""
    unit: str = ""
    option: str = ""
    also: tuple[str, ...] = ()
    formerly: tuple[str, ...] = ()
    alone: str = ""
    learned: bool | None = None
    initial: bool = False
    per_host: bool = False
    needs: tuple[Need, ...] = ()
    replaces: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """What a field with the settings of another dataclass declares; see ``section``."""

    prefix: str = ""
    hidden: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    learned: bool | None = None
    per_host: bool | None = None
    needs: str = ""
    needs_of: Mapping[str, str] = field(default_factory=dict)


class Leaf(NamedTuple):
    """A setting in a tree of dataclasses; names of options and settings are those of the tree."""

    type: Any
    default: Any  # dataclasses.MISSING if it must be given
    heading: str  # first line of the docstring of the dataclass that has it
    setting: Setting
    hidden: bool = False  # no option
    named: bool = False  # its section gives it its option's name


def setting(
    default: Value = REQUIRED,
    *,
    help: str,  # what --help says; how it is read is not repeated
    unit: str = "",  # of the value, which --help shows in place of NUMBER
    option: str = "",  # name of its option; "": the field's
    also: tuple[str, ...] = (),  # further names of the option that are understood
    # names that the field had, in records and as an option
    formerly: tuple[str, ...] = (),
    alone: str = "",  # value of its option without one
    # whether it decides what a training learns; None: no training has it
    learned: bool | None = None,
    # only where training starts: a resumed run has the checkpoint's, whatever it is set to
    initial: bool = False,
    # whether hosts may differ: where something is, or what follows the number of cores
    per_host: bool = False,
    # settings without which it has no effect; the form: Need.parse
    needs: str | tuple[str, ...] = (),
    replaces: str = "",  # the setting that is 0 where this one is given without it
) -> Value:
    """A field of a dataclass that is an option; without a default it must be given."""
    needed = (needs,) if isinstance(needs, str) else needs
    declared = Setting(
        help=help,
        unit=unit,
        option=option,
        also=also,
        formerly=formerly,
        alone=alone,
        learned=learned,
        initial=initial,
        per_host=per_host,
        needs=tuple(Need.parse(text) for text in needed),
        replaces=replaces,
    )
    # json_files.from_plain, which knows no options, reads ``formerly``
    return field(default=default, metadata={KEY: declared, "formerly": formerly})


def section(
    default: Value = REQUIRED,
    *,
    prefix: str = "",  # what precedes the names of its options
    hidden: tuple[str, ...] = (),  # settings without an option
    options: Mapping[str, str] = NOTHING,  # setting -> name of its option
    learned: bool | None = None,  # of all its settings; None: as each declares
    per_host: bool | None = None,  # of all its settings; None: as each declares
    needs: str = "",  # of all its settings
    needs_of: Mapping[str, str] = NOTHING,  # setting -> what this one needs
) -> Value:
    """A field of a dataclass that holds the settings of another one; without a default, some of
    them must be given."""
    declared = Section(
        prefix=prefix,
        hidden=hidden,
        options=options,
        learned=learned,
        per_host=per_host,
        needs=needs,
        needs_of=needs_of,
    )
    return field(default=default, metadata={KEY: declared})


def declared_by(item: dataclasses.Field[Any]) -> Any:
    """The Setting or Section of a field; None without one."""
    return item.metadata.get(KEY)


def leaves_of(kind: type, default: Any = MISSING) -> Iterator[tuple[str, Leaf]]:
    """(dotted name, leaf) of nested dataclasses; with the values of ``default``, or the fields'
    own."""
    hints = typing.get_type_hints(kind)
    heading = first_sentence(kind.__doc__ or "")
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        value = default_of(item) if default is MISSING else getattr(default, item.name)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            about = declared_by(item) or Section()
            for name, leaf in leaves_of(hint, value):
                leaf = _leaf_in_section(leaf, about, item.name, name)
                yield f"{item.name}.{name}", leaf
        else:
            declared = declared_by(item) or Setting()
            named = replace(declared, option=declared.option or item.name)
            yield item.name, Leaf(hint, value, heading, named)


def _leaf_in_section(leaf: Leaf, about: Section, section_name: str, name: str) -> Leaf:
    """The leaf ``name`` of a section's dataclass, as the dataclass with this section has it."""
    inner = leaf.setting
    needs = [
        need._replace(setting=f"{section_name}.{need.setting}") for need in inner.needs
    ]
    for text in (about.needs_of.get(name), about.needs):
        if text:
            needs.append(Need.parse(text))
    outer = replace(
        inner,
        option=about.options.get(name, about.prefix + inner.option),
        learned=inner.learned if about.learned is None else about.learned,
        per_host=inner.per_host if about.per_host is None else about.per_host,
        needs=tuple(needs),
        replaces=f"{section_name}.{inner.replaces}" if inner.replaces else "",
    )
    return leaf._replace(
        setting=outer,
        hidden=leaf.hidden or name in about.hidden,
        named=leaf.named or name in about.options or bool(about.prefix),
    )


def fields_that_declare(kind: type, name: str, value: Any) -> list[str]:
    """Dotted names of the fields of nested dataclasses that declare ``name=value``; a section that
    declares it stands for all of its fields."""
    hints = typing.get_type_hints(kind)
    names: list[str] = []
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if getattr(declared_by(item), name, None) == value:
            names.append(item.name)
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            for inner in fields_that_declare(hint, name, value):
                names.append(f"{item.name}.{inner}")
    return names


def first_sentence(docstring: str) -> str:
    """A docstring up to its first line that ends in a period or colon, on one line."""
    lines: list[str] = []
    for line in docstring.strip().splitlines():
        if not line.strip():
            break
        lines.append(line.strip())
        if line.rstrip().endswith((".", ":")):
            break
    return " ".join(lines).rstrip(".:")
