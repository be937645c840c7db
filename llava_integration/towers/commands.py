"""``llm2clip use`` and ``llm2clip towers``: choose a tower for ``--vision_tower llm2clip``, list the known ones."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from llava_integration.towers import names, registry
from llava_integration.towers.names import Place
from llm2clip_plugin.contracts import ContractError


def main_use(argv: list[str]) -> int:
    """``llm2clip use PATH_OR_HUB_ID``: what ``--vision_tower llm2clip`` means from now on."""
    parser = argparse.ArgumentParser(prog="llm2clip use", description=main_use.__doc__)
    parser.add_argument("tower", metavar="PATH|HUB_ID|KNOWN", help="tower directory, Hub id, or a name that is known")
    parser.add_argument("--name", default="", help="name to know it by (default: the last part of the path or id)")
    options = parser.parse_args(argv)
    place = names.locate_spec(options.tower, how=f"llm2clip use {options.tower}")
    name = registry.remember(place.origin, place.card.weights_sha256, choose=True, name=options.name)
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
        registry.forget(options.forget)
    known = registry.read()
    rows = [listing(name, entry, chosen=name == known.chosen) for name, entry in sorted(known.towers.items())]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        print(f"{'*' if row['chosen'] else ' '} {row['name']}: {row['found']}")
    if spec := os.environ.get("LLM2CLIP_TOWER"):
        print(f"LLM2CLIP_TOWER={spec} goes before the chosen one (*)")
    if not rows:
        print(f"no tower is known yet ({registry.registry_file()}); enter one with `llm2clip use PATH_OR_HUB_ID`")
    return 0


def listing(name: str, entry: dict[str, str], *, chosen: bool) -> dict[str, object]:
    """One row of ``llm2clip towers``; Hub towers are described from the local cache, nothing is downloaded."""
    row: dict[str, object] = {"name": name, "chosen": chosen, **entry}
    if names.HUB_ID.match(entry["spec"]) and not Path(entry["spec"]).is_dir():
        return {**row, "found": f"on the Hub as {entry['spec']}, sha256 {entry['weights_sha256'][:12]}"}
    try:
        place = names.locate_spec(entry["spec"], how=name)
    except (FileNotFoundError, ContractError) as error:
        return {**row, "found": f"not usable: {error}"}
    return {**row, "found": describe(place), "card": asdict(place.card)}


def describe(place: Place) -> str:
    """A tower in one line: where it lies, hash, widths, patches."""
    card = place.card
    grid = card.image_size // card.patch_size
    return (
        f"{place.origin}, sha256 {card.weights_sha256[:12]}, {card.family}, width {card.hidden_size}, "
        f"{card.num_layers} blocks, {card.image_size} px, {grid} x {grid} = {card.num_patches} patches"
    )
