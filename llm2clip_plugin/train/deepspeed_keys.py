"""A DeepSpeed JSON against what DeepSpeed itself reads: unknown keys and refused values, named with the file.

DeepSpeed validates most sections with pydantic, whose text names neither the file nor the section, and ignores unknown
names outside them: ``zero_optimizaton`` would train without ZeRO. The known names are those that DeepSpeed looks up.
"""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ValidationError  # comes with DeepSpeed

from llm2clip_plugin.options.names import closest, nearest

SECTIONS = ("zero_optimization", "fp16", "bf16", "optimizer", "scheduler", "data_types", "aio", "flops_profiler")
MONITOR_SECTIONS = ("tensorboard", "wandb", "csv_monitor", "comet")
STAGES = (0, 1, 2, 3)
COMMENTS = ("_", "/", "#")  # names that begin so are nobody's
SIMILAR = 0.85  # a misspelling


class _LookedUp(dict[str, Any]):
    """A configuration that notes which names are looked up in it; so do its copies, in the same set."""

    names: set[str]

    def __contains__(self, name: object) -> bool:
        self._note(name)
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self._note(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._note(name)
        return super().get(name, default)

    def _note(self, name: object) -> None:
        if hasattr(self, "names"):
            self.names.add(str(name))


def check_sections(config: dict[str, Any], where: str) -> None:
    """Raise ValueError for a section that is no object, or a ZeRO stage that does not exist."""
    for name in (*SECTIONS, *MONITOR_SECTIONS):
        section = config.get(name, {})
        if not isinstance(section, dict):
            raise ValueError(f'{where}: {name} is {section!r}, expected an object such as {{"enabled": true}}')
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in STAGES:
        raise ValueError(f"{where}: zero_optimization.stage is {stage!r}; known: {', '.join(map(str, STAGES))}")


def check_keys(
    config: dict[str, Any], where: str, *, read: Callable[[dict[str, Any]], object], models: Iterable[type[BaseModel]]
) -> None:
    """Let DeepSpeed ``read`` a completed configuration. Raises ValueError that names the file, the key and, for a
    misspelled one, the nearest; a name that nothing looks up and that resembles none is a warning on stderr.

    models: DeepSpeed's sections, whose fields are the known names in them.
    """
    looked_up = _LookedUp(config)
    looked_up.names = set()
    try:
        read(looked_up)
    except ValidationError as error:
        raise ValueError(f"{where}: {_describe(error, config, models)}") from error
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise ValueError(f"{where}: DeepSpeed refuses it: {error}") from error
    for name in config:
        if name in looked_up.names or name.startswith(COMMENTS):
            continue
        if near := closest(name, sorted(looked_up.names), SIMILAR):
            raise ValueError(f"{where}: unknown key {name!r}; did you mean {near!r}?")
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {where}: DeepSpeed does not read the key {name!r}; it has no effect", file=sys.stderr)


def _describe(error: ValidationError, config: dict[str, Any], models: Iterable[type[BaseModel]]) -> str:
    """The first refused value: its dotted path, what it is, and what is expected."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    sections = [name for name, value in config.items() if isinstance(value, dict) and path and path[0] in value]
    section = sections[0] if sections else ""
    name = ".".join([section, *path] if section else path)
    if first["type"] == "extra_forbidden":
        fields = sorted({field for model in models for field in model.model_fields})
        parents = name.split(".")[:-1]
        return f"unknown key {name!r}" + nearest(path[-1], fields, lambda near: repr(".".join([*parents, near])))
    expected = first["msg"].removeprefix("Input should be ")
    return f"{name} is {first['input']!r}, expected {expected}"
