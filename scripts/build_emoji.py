#!/usr/bin/env python3
"""Build the built-in emoji set: three drawing styles, English captions, names in other languages.

    pip install resvg-py pillow && scripts/build_emoji.py       # into llm2clip_plugin/data/emoji

Drawings, groups and names come from npm packages, fetched by name and version with the ordinary ``npm`` client. One
WebDataset shard a split and style. A sample is ``<key>.png`` and ``<key>.json``: captions with kind and language,
keywords, and the concept, family, group, subgroup, style and split. Kinds: short (the name), long (name, subgroup,
group, keywords), keywords (those without a word of the name, if there are two). Names in other languages are in the
validation and test shards alone. The split is by *family* (gender, person and direction code points stripped,
look-alikes put together): a random one would put a concept, drawn for another gender or mirrored, on both sides.
"""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts" / "quickstart"))
from shards import EMOJI, SPLITS, Description, draw, write_tar  # noqa: E402 - beside the scripts, in no package

CACHE = ROOT / "quickstart-output" / "npm"  # unpacked packages
STYLES = {  # style -> npm package of its SVG bodies
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
}
GROUPS = "emoji.json@16.0.0"  # Unicode's groups and subgroups
NAMES = "cldr-annotations-full@48.2.0"
DERIVED_NAMES = "cldr-annotations-derived-full@48.2.0"
LANGUAGES = ("de", "fr", "es", "pl", "tr", "ru", "zh", "ja", "ar", "hi", "vi")

PERSONS = {"1f468", "1f469", "1f9d1", "1f466", "1f467", "1f9d2", "1f474", "1f475", "1f9d3"}  # man, woman ... old person
NO_OTHER_PICTURE = {"2640", "2642", "200d", "27a1"}  # genders, joiner, "facing right": drawn alike, or mirrored
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
SERIES = ("time", "heart", "keycap", "geometric", "arrow")  # subgroups whose members differ in one detail
SAME_FAMILY = {  # the same person in another gender, or the same picture mirrored, under another code point
    "1f478": "1f934",  # princess, prince
    "1f936": "1f385",  # Mrs. Claus, Santa Claus
    "1f57a": "1f483",  # man dancing, woman dancing
    "1f46c": "1f46b",  # men holding hands, woman and man holding hands
    "1f46d": "1f46b",
    "1fac3": "1f930",  # pregnant man, pregnant woman
    "1fac4": "1f930",
    "2764-1f48b": "1f48f",  # kiss
    "2764": "1f491",  # couple with heart (hearts themselves are a series)
    **dict.fromkeys(("1f312", "1f313", "1f314", "1f316", "1f317", "1f318"), "1f311"),  # phases of the moon
    "1f31b": "1f31c",  # quarter moon faces
    "1faf7": "1faf8",  # pushing hands
    "1faf1": "1faf2",  # hands from the side
    "1f91b": "1f91c",  # fists from the side
    "1f91a": "270b",  # raised hand and its back
    "23ea": "23e9",  # fast reverse, fast forward
    "23ee": "23ed",  # last track, next track
    "1f513": "1f512",  # unlocked, locked
    **dict.fromkeys(("1f509", "1f50a"), "1f508"),  # speakers
}
LARGEST_HELD_OUT = 12  # families with more members stay in training
TEST, VALIDATION = 326, 200  # concepts; the rest train
SPLIT_SEED = "llm2clip-emoji-1"


def words_of(text: str) -> set[str]:
    """Lower-case words, a plural s dropped."""
    return {word.removesuffix("s") for word in re.findall(r"\w+", text.lower())}


def fetch(package: str) -> Path:
    """Folder of an unpacked npm package (``name@version``), downloaded once into ``CACHE``."""
    folder = CACHE / re.sub(r"[^\w.-]+", "-", package).strip("-")
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=CACHE, check=True, stdout=subprocess.PIPE, text=True
        )
        with tarfile.open(CACHE / packed.stdout.split()[-1]) as tar:
            tar.extractall(folder, filter="data")
    return folder / "package"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def code_of(text: str) -> str:
    """``1F3F4 FE0F`` or ``0023-20E3`` -> ``1f3f4``, ``23-20e3``: no variation selector, no leading zeros."""
    points = [point.lower().lstrip("0") for point in re.split(r"[ -]", text)]
    return "-".join(point for point in points if point != "fe0f")


def read_names(language: str) -> dict[str, dict[str, list[str]]]:
    """code -> {"tts": [name], "default": keywords} of a CLDR locale, base and derived annotations together."""
    entries: dict[str, dict[str, list[str]]] = {}
    for package, key in ((DERIVED_NAMES, "annotationsDerived"), (NAMES, "annotations")):
        body = read_json(fetch(package) / key / language / "annotations.json")
        for character, entry in body[key].get("annotations", {}).items():
            entries[code_of(" ".join(f"{ord(c):x}" for c in character))] = entry
    return entries


def family_of(code: str, subgroup: str) -> str:
    """The family of a concept: what is left of its code points without gender, person, direction and joiners."""
    if subgroup in SERIES:
        return subgroup
    rest = "-".join(p for p in code.split("-") if p not in PERSONS | NO_OTHER_PICTURE)
    return SAME_FAMILY.get(rest, rest) or "person"


def split_families(sizes: Mapping[str, int], test: int = TEST, validation: int = VALIDATION) -> dict[str, str]:
    """family -> split, with exactly ``test`` and ``validation`` concepts held out.

    Families go in the order of a hash of their names (independent of files and random states), each into the first
    held-out split with enough concepts left to fill.
    """
    left = {"test": test, "validation": validation}
    split = dict.fromkeys(sizes, "train")
    for family in sorted(sizes, key=lambda f: hashlib.sha256(f"{SPLIT_SEED}:{f}".encode()).digest()):
        if sizes[family] > LARGEST_HELD_OUT:
            continue
        for name, free in left.items():
            if sizes[family] <= free:
                split[family] = name
                left[name] -= sizes[family]
                break
    if any(left.values()):
        raise ValueError(f"families of {sum(sizes.values())} concepts cannot fill the held-out splits: {left} left")
    return split


def read_concepts(icons: Mapping[str, Mapping[str, str]]) -> list[Description]:
    """The JSON, without the style, of every concept that all styles draw, in Unicode's order."""
    drawn = set.intersection(*map(set, icons.values()))
    rows = {code_of(row["codes"]): row for row in read_json(fetch(GROUPS) / "emoji.json")}
    rows = {code: row for code, row in rows.items() if code in drawn and not SKIN_TONES & set(code.split("-"))}
    english = read_names("en")
    others = {language: read_names(language) for language in LANGUAGES}
    subgroup = {code: re.sub(r"\W+", "-", row["subgroup"].lower()).strip("-") for code, row in rows.items()}
    family = {code: family_of(code, subgroup[code]) for code in rows}
    split = split_families(Counter(family.values()))
    concepts = []
    for code, row in rows.items():
        name, keywords = english[code]["tts"][0], english[code].get("default", [])
        translations = {lang: names[code]["tts"][0] for lang, names in others.items() if code in names}
        captions = english_captions(name, keywords, row["group"], subgroup[code])
        if split[family[code]] != "train":
            captions += [{"text": text, "kind": "short", "language": lang} for lang, text in translations.items()]
        about = {"captions": captions, "concept": code, "emoji": row["char"], "family": family[code]}
        about |= {"group": row["group"], "subgroup": subgroup[code], "keywords": keywords}
        concepts.append({**about, "split": split[family[code]]})
    return concepts


def english_captions(name: str, keywords: Sequence[str], group: str, subgroup: str) -> list[dict[str, str]]:
    """Name, long caption, and the keywords without a word of the name, if there are two, which test meaning."""
    unnamed = [keyword for keyword in keywords if not words_of(keyword) & words_of(name)]
    long = f"{name}, a picture of {subgroup.replace('-', ' ')} ({group.lower()}): {', '.join(keywords)}."
    texts = {"short": name, "long": long} | ({"keywords": ", ".join(unnamed)} if len(unnamed) >= 2 else {})
    return [{"text": text, "kind": kind, "language": "en"} for kind, text in texts.items()]


def read_icons(package: Path) -> dict[str, str]:
    """code -> SVG document of a style."""
    icons, characters = read_json(package / "icons.json"), read_json(package / "chars.json")
    return {code_of(code): svg_document(name, icons) for code, name in characters.items()}


def svg_document(name: str, icons: Mapping[str, Any]) -> str:
    """The icon ``name`` of an Iconify set as an SVG document; aliases may flip or turn their parent."""
    flip_x = flip_y = False
    turns = 0
    while name in icons.get("aliases", {}):
        alias = icons["aliases"][name]
        flip_x ^= alias.get("hFlip", False)
        flip_y ^= alias.get("vFlip", False)
        turns += alias.get("rotate", 0)
        name = alias["parent"]
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    x, y = left + width / 2, top + height / 2
    change = f"rotate({90 * turns} {x} {y}) translate({x} {y}) scale({-1 if flip_x else 1} {-1 if flip_y else 1})"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">'
        f'<g transform="{change} translate({-x} {-y})">{icon["body"]}</g></svg>'
    )


def main() -> None:
    """Write every split of every style."""
    icons = {style: read_icons(fetch(package)) for style, package in STYLES.items()}
    concepts = read_concepts(icons)
    for style, of_style in icons.items():
        for split in SPLITS:
            chosen = [one for one in concepts if one["split"] == split]
            samples = [
                (f"{style}-{one['concept']}", draw(of_style[one["concept"]]), {**one, "style": style}) for one in chosen
            ]
            write_tar(EMOJI / f"{split}-{style}.tar", samples)
            print(f"{split}-{style}.tar: {len(chosen)} samples", file=sys.stderr)


if __name__ == "__main__":
    main()
