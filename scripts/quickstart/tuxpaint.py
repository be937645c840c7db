#!/usr/bin/env python3
"""Make a test shard from Tux Paint's stamps: photographs and drawings with sentences in 12 languages.

    scripts/quickstart/tuxpaint.py --output quickstart-output/tuxpaint [--stamps DIR]

The stamps are Debian's package ``tuxpaint-stamps-default`` (GPL-2). They are taken from ``--stamps``, else from
/usr/share/tuxpaint/stamps, else downloaded from the mirror that apt is configured with; root is not needed. Only
``OUTPUT/test-tuxpaint.tar`` is kept. A stamp is ``X.png`` with ``X.txt``: the first line in English, then
``de.utf8=Ein Hund.`` and so on. Symbols and letters are left out, and languages that the built-in set doesn't have.
"""

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from shards import Description, Sample, write_tar

from llm2clip_plugin.contracts import atomic_file

PACKAGE = "tuxpaint-stamps-default"
INSTALLED = Path("/usr/share/tuxpaint/stamps")
SHARD = "test-tuxpaint.tar"
SIDE = 98  # pixels, as the built-in set
LEFT_OUT = "symbols"  # folder of letters, digits, notes, shapes
LANGUAGES = {name: name for name in ("de", "fr", "es", "pl", "tr", "ru", "ja", "ar", "hi", "vi")} | {"zh": "zh_CN"}
DOWNLOAD_SECONDS = 600


def sentences(path: Path) -> dict[str, str]:
    """Language -> sentence; a translation that repeats the English one is none."""
    first, *others = path.read_text(encoding="utf-8").splitlines() or [""]
    of_locale = dict(line.split("=", 1) for line in others if "=" in line)
    found = {"en": first.strip()}
    for language, locale in LANGUAGES.items():
        text = of_locale.get(f"{locale}.utf8", "").strip()
        if text and text != found["en"]:
            found[language] = text
    return found


def square(path: Path) -> bytes:
    """The picture as a PNG: whole, in the middle of a white square."""
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIDE, SIDE), "white")
    canvas.alpha_composite(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    body = io.BytesIO()
    canvas.convert("RGB").save(body, "png")
    return body.getvalue()


def describe(stamps: Path, path: Path) -> Description:
    """The sample's JSON. Pictures with one English sentence are one concept; a folder is a family.

    ``style``: drawings are those in a folder ``cartoon`` or with an SVG file; the others are mostly photographs.
    """
    texts, folder = sentences(path.with_suffix(".txt")), path.relative_to(stamps).parent
    drawn = "cartoon" in folder.parts or path.with_suffix(".svg").is_file()
    return {
        "captions": [{"text": text, "kind": "short", "language": language} for language, text in texts.items()],
        "concept": texts["en"],
        "family": "/".join(part for part in folder.parts if part != "cartoon"),
        "kind": folder.parts[0] if folder.parts else "",
        "style": "drawing" if drawn else "photograph",
        "split": "test",
    }


def read_stamps(stamps: Path) -> list[Sample]:
    """Every stamp that has a sentence, except symbols. Raises ValueError if there is none."""
    samples = []
    for path in sorted(stamps.rglob("*.png")):
        if path.relative_to(stamps).parts[0] == LEFT_OUT or not path.with_suffix(".txt").is_file():
            continue
        about = describe(stamps, path)
        if about["concept"]:
            key = path.relative_to(stamps).with_suffix("").as_posix().replace("/", "_").replace(".", "_")
            samples.append((key, square(path), about))
    if not samples:
        raise ValueError(f"{stamps} contains no pictures with a sentence; expected X.png with X.txt, as in {INSTALLED}")
    return samples


def download(package: str, folder: Path) -> Path:
    """Debian's package, unpacked below ``folder``. Raises OSError if it can't be downloaded."""
    own = [f"Dir::State::lists={folder}/lists", f"Dir::Cache={folder}/cache", "Debug::NoLocking=true"]
    options = [word for option in own for word in ("-o", option)]
    try:
        if _run(["apt-get", "-q", "download", package], folder):  # without package lists: download them, too
            for name in ("lists", "cache"):
                (folder / name / ("archives" if name == "cache" else "") / "partial").mkdir(parents=True)
            said = _run(["apt-get", "-q", *options, "update"], folder)
            said = _run(["apt-get", "-q", *options, "download", package], folder) or said
        packages = list(folder.glob(f"{package}_*.deb"))
        if not packages:
            raise OSError(f"apt-get cannot download {package}: {said.splitlines()[-1]}")
        if said := _run(["dpkg-deb", "-x", str(packages[0]), str(folder / "unpacked")], folder):
            raise OSError(f"dpkg-deb cannot unpack {packages[0].name}: {said.splitlines()[-1]}")
    except FileNotFoundError as error:  # no Debian, no Ubuntu
        raise OSError(f"{error.filename} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"no answer to {' '.join(error.cmd)} in {error.timeout:.0f} seconds") from error
    return folder / "unpacked"


def _run(command: list[str], folder: Path) -> str:
    """Run it in ``folder``; "" if that succeeds, else its output."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    return (done.stderr + done.stdout).strip() or f"exit status {done.returncode}" if done.returncode else ""


def prepare(output: Path, stamps: Path | None) -> None:
    """Write the shard unless it exists. Raises OSError or ValueError without stamps."""
    shard = output / SHARD
    if shard.is_file():
        return
    with tempfile.TemporaryDirectory() as scratch:
        found = stamps or (INSTALLED if INSTALLED.is_dir() else None)
        if found is None:
            print(f"downloading {PACKAGE} (81 MB, GPL-2)", file=sys.stderr)
            found = download(PACKAGE, Path(scratch)) / INSTALLED.relative_to("/")
        samples = read_stamps(found)
    output.mkdir(parents=True, exist_ok=True)
    with atomic_file(shard) as temporary:
        write_tar(temporary, samples)
    print(f"{len(samples)} stamps in {shard}", file=sys.stderr)


def main() -> None:
    """Parse the command line and write the shard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/tuxpaint"))
    parser.add_argument("--stamps", type=Path, help="folder of the stamps, if they are on this machine")
    options = parser.parse_args()
    try:
        prepare(options.output, options.stamps)
    except (OSError, ValueError) as error:
        sys.exit(
            f"error: no Tux Paint stamps: {error}. Install {PACKAGE}, or unpack it and set "
            "TUXPAINT_STAMPS to its folder usr/share/tuxpaint/stamps"
        )


if __name__ == "__main__":
    main()
