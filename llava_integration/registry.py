"""The towers that a user knows by name, and the chosen one: ``llm2clip use`` and ``llm2clip towers``.

One JSON file, ``$LLM2CLIP_HOME/towers.json``, by default in ``$XDG_CONFIG_HOME/llm2clip`` or
``~/.config/llm2clip``.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from llm2clip_plugin.contracts import ContractError, VersionedRecord


@dataclass(frozen=True, kw_only=True)
class Registry(VersionedRecord):
    """``towers.json``: what `llm2clip towers` lists."""

    KIND: ClassVar[str] = "llm2clip-towers"
    FILE: ClassVar[str] = "towers.json"

    chosen: str = ""  # key of towers; "" before the first `llm2clip use`
    towers: dict[str, dict[str, str]] = field(default_factory=dict)  # name -> {"spec", "weights_sha256"}

    def summary(self) -> str:
        """What is known, for the end of an error message."""
        if not self.towers:
            return f"`llm2clip towers` knows none ({registry_file()})"
        return "known towers: " + ", ".join(f"{name} ({entry['spec']})" for name, entry in sorted(self.towers.items()))


def registry_file() -> Path:
    """Where the registry lies; the file need not exist."""
    home = os.environ.get("LLM2CLIP_HOME")
    if home:
        return Path(home).expanduser() / Registry.FILE
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config).expanduser() / "llm2clip" / Registry.FILE


def read() -> Registry:
    """The registry; an empty one before the first entry."""
    path = registry_file()
    return Registry.read(path) if path.is_file() else Registry()


def remember(spec: str, weights_sha256: str, *, choose: bool, name: str = "") -> str:
    """Enter a tower (``spec`` = absolute path or Hub id) and return the name under which it is known."""
    known = read()
    name = name or next((name for name, entry in known.towers.items() if entry["spec"] == spec), "")
    name = name or free_name(spec, known)
    towers = {**known.towers, name: {"spec": spec, "weights_sha256": weights_sha256}}
    replace(known, chosen=name if choose or not known.chosen else known.chosen, towers=towers).write(registry_file())
    return name


def free_name(spec: str, known: Registry) -> str:
    """The last part of ``spec``, numbered if another tower has it already."""
    stem = spec.partition("@")[0].rstrip("/").rpartition("/")[2]
    return next(
        name
        for number in range(1, len(known.towers) + 2)
        if (name := stem if number == 1 else f"{stem}-{number}") not in known.towers
    )


def forget(name: str) -> None:
    """Drop an entry; ValueError lists the known ones if there is none of that name."""
    known = read()
    if name not in known.towers:
        raise ValueError(f"no tower is known as {name!r}; {known.summary()}")
    towers = {key: entry for key, entry in known.towers.items() if key != name}
    replace(known, chosen="" if known.chosen == name else known.chosen, towers=towers).write(registry_file())


def main_use(argv: list[str]) -> int:
    """``llm2clip use PATH_OR_HUB_ID``: what ``--vision_tower llm2clip`` means from now on."""
    from llava_integration import names

    parser = argparse.ArgumentParser(prog="llm2clip use", description=main_use.__doc__)
    parser.add_argument("tower", metavar="PATH|HUB_ID|KNOWN", help="tower directory, Hub id, or a name that is known")
    parser.add_argument("--name", default="", help="name to know it by (default: the last part of the path or id)")
    options = parser.parse_args(argv)
    place = names.locate_spec(options.tower, how=f"llm2clip use {options.tower}")
    name = remember(place.origin, place.card.weights_sha256, choose=True, name=options.name)
    print(f"--vision_tower llm2clip is now {name}: {describe(place)}")
    if os.environ.get("LLM2CLIP_TOWER"):
        print(f"note: LLM2CLIP_TOWER={os.environ['LLM2CLIP_TOWER']} is set here and goes first")
    return 0


def main_towers(argv: list[str]) -> int:
    """``llm2clip towers``: the towers that are known, where they lie, their hashes, widths and patches."""
    parser = argparse.ArgumentParser(prog="llm2clip towers", description=main_towers.__doc__)
    parser.add_argument("--forget", metavar="NAME", help="drop a tower from the list; its files stay")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    options = parser.parse_args(argv)
    if options.forget:
        forget(options.forget)
    known = read()
    rows = [listing(name, entry, chosen=name == known.chosen) for name, entry in sorted(known.towers.items())]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        print(f"{'*' if row['chosen'] else ' '} {row['name']}: {row['found']}")
    if spec := os.environ.get("LLM2CLIP_TOWER"):
        print(f"LLM2CLIP_TOWER={spec} goes before the chosen one (*)")
    if not rows:
        print(f"no tower is known yet ({registry_file()}); enter one with `llm2clip use PATH_OR_HUB_ID`")
    return 0


def listing(name: str, entry: dict[str, str], *, chosen: bool) -> dict[str, object]:
    """One row of ``llm2clip towers``; Hub towers are described from the local cache, nothing is downloaded."""
    from llava_integration import names

    row: dict[str, object] = {"name": name, "chosen": chosen, **entry}
    if names.HUB_ID.match(entry["spec"]) and not Path(entry["spec"]).is_dir():
        return {**row, "found": f"on the Hub as {entry['spec']}, sha256 {entry['weights_sha256'][:12]}"}
    try:
        place = names.locate_spec(entry["spec"], how=name)
    except (FileNotFoundError, ContractError) as error:
        return {**row, "found": f"not usable: {error}"}
    return {**row, "found": describe(place), "card": asdict(place.card)}


def describe(place) -> str:
    """A tower in one line: where it lies, hash, widths, patches."""
    card = place.card
    grid = card.image_size // card.patch_size
    return (
        f"{place.origin}, sha256 {card.weights_sha256[:12]}, {card.family}, width {card.hidden_size}, "
        f"{card.num_layers} blocks, {card.image_size} px, {grid} x {grid} = {card.num_patches} patches"
    )
