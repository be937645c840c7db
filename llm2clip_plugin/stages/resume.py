"""What a resumed run and its checkpoint, and all ranks of a run, must have in common: what the
settings of its configuration declare."""

from collections.abc import Iterable, Iterator
from typing import Any

from llm2clip_plugin.options.setting import fields_that_declare, leaves_of


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested dicts; a list is a leaf, as JSON returns it,
    numbers are floats."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from flat(item, f"{path}.{name}" if path else name)
    else:
        yield path, _plain(value)


def _plain(value: Any) -> Any:
    """4 and 4.0 are the same setting."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def within(name: str, fields: Iterable[str]) -> bool:
    """Whether a dotted name is one of the fields, or in one of them."""
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def flat_essentials(
    kind: type, settings: dict[str, Any], allowed: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The leaves of a configuration ``kind`` that decide what is learned, without the ``allowed``
    ones. One that the configuration does not have, as in an older checkpoint, is among them."""
    current_name = {}
    for name, leaf in leaves_of(kind):
        section, dot, _ = name.rpartition(".")
        for earlier in leaf.setting.formerly:
            current_name[f"{section}{dot}{earlier}"] = name
    allowed_names = [current_name.get(name, name) for name in allowed]
    ignored = (*fields_that_declare(kind, "learned", False), *allowed_names)
    named = {current_name.get(name, name): value for name, value in flat(settings)}
    return {name: value for name, value in named.items() if not within(name, ignored)}


def same_on_all_hosts(kind: type, settings: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a configuration ``kind`` that all ranks must have in common."""
    differing = fields_that_declare(kind, "per_host", True)
    return {
        name: value for name, value in flat(settings) if not within(name, differing)
    }


def refuse_changes(
    kind: type,
    saved: dict[str, Any],
    now: dict[str, Any],
    allowed: tuple[str, ...],
    *,
    where: str,
) -> None:
    """Raise ValueError naming every field of a configuration ``kind`` that decides what is learned
    and differs from the checkpoint's."""
    paths = {path for settings in (now, saved) for path, _ in flat(settings)}
    for name in allowed:
        if not any(within(path, [name]) for path in paths):
            raise ValueError(
                f"--allow-changed {name}: a run has no such field; run.json has all"
            )
    not_compared = (*allowed, *fields_that_declare(kind, "initial", True))
    old = flat_essentials(kind, saved, not_compared)
    new = flat_essentials(kind, now, not_compared)
    listed = ""
    changed = [
        name
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    for name in changed:
        old_value = old.get(name, "absent")
        new_value = new.get(name, "absent")
        listed += (
            f"\n  {name}: {old_value!r} in the checkpoint, {new_value!r} in this run"
        )
    if changed:
        raise ValueError(
            f"{where} was saved with other settings:{listed}\n"
            "restore them, choose another --output, or accept the changes with "
            f"--allow-changed {' '.join(changed)}"
        )
