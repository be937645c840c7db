"""The built-in emoji set as it is shipped: counts, no leak between the splits, captions,
notices."""

import io
import json
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EMOJI = ROOT / "llm2clip_plugin" / "data" / "emoji"
COUNTS = {"train": 1068, "validation": 200, "test": 326}
STYLES = ("noto", "twemoji", "fluent")
LANGUAGES = {"de", "fr", "es", "pl", "tr", "ru", "zh", "ja", "ar", "hi", "vi"}


def read_shard(path: Path) -> dict[str, dict]:
    """key -> description with the picture's bytes under "png"."""
    samples: dict[str, dict] = defaultdict(dict)
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            body = tar.extractfile(member).read()
            samples[key].update({"png": body} if suffix == "png" else json.loads(body))
    return dict(samples)


@pytest.fixture(scope="module")
def shards() -> dict[tuple[str, str], dict[str, dict]]:
    return {
        (split, style): read_shard(EMOJI / f"{split}-{style}.tar")
        for split in COUNTS
        for style in STYLES
    }


def test_every_shard_has_its_concepts_once(shards) -> None:
    assert sorted(p.stem for p in EMOJI.glob("*.tar")) == sorted(
        f"{split}-{style}" for split, style in shards
    )
    for (split, style), samples in shards.items():
        assert (
            len({s["concept"] for s in samples.values()})
            == len(samples)
            == COUNTS[split]
        )
        assert {(s["split"], s["style"]) for s in samples.values()} == {(split, style)}
    for split in COUNTS:
        of_style = []
        for style in STYLES:
            of_style.append([s["concept"] for s in shards[split, style].values()])
        assert of_style[0] == of_style[1] == of_style[2]


def test_keys_are_unique_over_all_shards(shards) -> None:
    keys = Counter(key for samples in shards.values() for key in samples)
    assert len(keys) == 3 * 1594
    assert max(keys.values()) == 1


def test_no_family_and_no_name_is_in_two_splits(shards) -> None:
    for field in ("family", "concept"):
        splits = defaultdict(set)
        for samples in shards.values():
            for sample in samples.values():
                splits[sample[field]].add(sample["split"])
        assert all(len(splits_of_value) == 1 for splits_of_value in splits.values()), (
            field
        )
    names = {}
    for split in COUNTS:
        captions = [s["captions"] for s in shards[split, "noto"].values()]
        names[split] = {two[number]["text"] for two in captions for number in (0, 1)}
    assert not names["train"] & names["test"]
    assert not names["train"] & names["validation"]
    assert not names["validation"] & names["test"]


def thumbnail(png: bytes) -> np.ndarray:
    image = (
        Image.open(io.BytesIO(png))
        .convert("RGB")
        .resize((12, 12), Image.Resampling.BOX)
    )
    return np.asarray(image, dtype=np.float32)


@pytest.mark.parametrize("style", STYLES)
def test_no_picture_is_in_two_splits_also_mirrored(shards, style: str) -> None:
    """Stage 2 mirrors its pictures. Levels of 255, mean over 12 x 12 pixels: a mirrored drawing
    differs by under 1."""
    samples = [sample for split in COUNTS for sample in shards[split, style].values()]
    picture_NHWC = np.stack([thumbnail(sample["png"]) for sample in samples])
    flat_ND = picture_NHWC.reshape(len(samples), -1)
    mirrored_ND = picture_NHWC[:, :, ::-1].reshape(len(samples), -1)
    split_N = np.array([sample["split"] for sample in samples])
    alike = []
    for number in np.flatnonzero(split_N != "train"):
        for others_ND in (flat_ND, mirrored_ND):
            difference_N = np.abs(others_ND - flat_ND[number]).mean(1)
            is_alike_N = (difference_N < 1) & (split_N != split_N[number])
            for other in np.flatnonzero(is_alike_N):
                alike.append((samples[number]["concept"], samples[other]["concept"]))
    assert not alike


def test_captions(shards) -> None:
    for (split, _), samples in shards.items():
        for key, sample in samples.items():
            assert all(c["text"].strip() for c in sample["captions"]), key
            english = {
                c["kind"]: c["text"]
                for c in sample["captions"]
                if c["language"] == "en"
            }
            others = [c for c in sample["captions"] if c["language"] != "en"]
            assert {"short", "long"} <= set(english) <= {"short", "long", "keywords"}, (
                key
            )
            parts = (english["short"], *sample["keywords"])
            assert all(part in english["long"] for part in parts), key
            # names in other languages are for evaluation alone, so training shards must not have
            # them
            assert {c["language"] for c in others} == (
                set() if split == "train" else LANGUAGES
            ), key
            assert {c["kind"] for c in others} <= {"short"}, key


def test_notices_name_every_style_and_license_texts_exist() -> None:
    notice = (EMOJI / "NOTICE.md").read_text(encoding="utf-8")
    for style, licence in (
        ("noto", "Apache-2.0"),
        ("twemoji", "CC-BY-4.0"),
        ("fluent", "MIT"),
    ):
        (row,) = [line for line in notice.splitlines() if f"`*-{style}.tar`" in line]
        assert licence in row
    for name in (
        "LICENSE-apache-2.0.txt",
        "LICENSE-mit-fluent.txt",
        "LICENSE-unicode-3.0.txt",
    ):
        assert name in notice
        assert (EMOJI / name).stat().st_size > 500
    assert not list(EMOJI.glob("*openmoji*")), "share-alike art must not be shipped"
