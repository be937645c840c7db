"""``llm2clip use`` and ``llm2clip towers``: the towers registered for ``--vision_tower llm2clip``."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from llava_integration.towers import names, registry
from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.options.command import Command


@dataclass(frozen=True, kw_only=True)
class UseConfig:
    """The tower to use."""

    tower: str  # tower directory, Hub id, or a registered name
    name: str = ""  # register it under this name; "": last part of the path or id


@dataclass(frozen=True, kw_only=True)
class TowersConfig:
    """How to list the towers."""

    forget: str = ""  # name of a tower to remove from the list; its files are kept
    json: bool = False  # print JSON


USE = Command(
    name="use",
    example="llm2clip use towers/l14-336",
    about="Register a tower and make it the one that --vision_tower llm2clip loads.",
    settings=UseConfig,
    arguments="tower",
)
TOWERS = Command(
    name="towers",
    example="llm2clip towers",
    about="List the registered towers: location, hash, width, patches. An asterisk marks the selected one.",
    settings=TowersConfig,
)


def main_use(argv: list[str]) -> int:
    """Register a tower and make it the one that --vision_tower llm2clip loads."""
    options = USE.parse(argv)
    location = names.locate_spec(options.tower, how=f"llm2clip use {options.tower}")
    location.check_weights()
    name = registry.select(location.origin, location.sha256, name=options.name)
    print(f"--vision_tower llm2clip is now {name}: {location.describe()}")
    if spec := os.environ.get("LLM2CLIP_TOWER"):
        print(f"note: LLM2CLIP_TOWER={spec} is set and takes precedence")
    return 0


def main_towers(argv: list[str]) -> int:
    """List the registered towers: location, hash, width, patches. An asterisk marks the selected one."""
    options = TOWERS.parse(argv)
    if options.forget:
        registry.forget(options.forget)
    known = registry.read()
    rows = [listing(name, entry, chosen=name == known.chosen) for name, entry in sorted(known.towers.items())]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        print(f"{'*' if row['chosen'] else ' '} {row['name']}: {row['found']}")
    if spec := os.environ.get("LLM2CLIP_TOWER"):
        print(f"LLM2CLIP_TOWER={spec} takes precedence over the selected tower (*)")
    if not rows:
        print(f"{known.summary()}; register one with `llm2clip use PATH_OR_HUB_ID`")
    return 0


def listing(name: str, entry: dict[str, str], *, chosen: bool) -> dict[str, object]:
    """One row of ``llm2clip towers``, its description under "found"; Hub towers are not downloaded for it."""
    row: dict[str, object] = {"name": name, "chosen": chosen, **entry}
    if names.HUB_ID.match(entry["spec"]) and not Path(entry["spec"]).is_dir():
        return {**row, "found": f"on the Hub as {entry['spec']}, sha256 {entry['weights_sha256'][:12]}"}
    try:
        location = names.locate_spec(entry["spec"], how=name)
    except (FileNotFoundError, ContractError) as error:
        return {**row, "found": f"not usable: {error}"}
    return {**row, "found": location.describe(), "card": asdict(location.card)}
