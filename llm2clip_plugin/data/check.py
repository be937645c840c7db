"""``llm2clip data check DATA``: read a data set once, decode every image, and report statistics and broken samples."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_plugin.console import progress_bar
from llm2clip_plugin.data import cores, parallel
from llm2clip_plugin.data.samples import (
    BrokenImage,
    BrokenSample,
    Caption,
    Sample,
    caption_hash,
    has_transparency,
    load,
    open_header,
    select_captions,
    words_of,
)
from llm2clip_plugin.data.sources import Source, SourceConfig, check_fields, open_source
from llm2clip_plugin.files import check_hub_answers, printable
from llm2clip_plugin.options import Command

CHUNK = 64  # samples that a worker reads in one task
NO_IMAGE = ("no image '", 'no image "')  # how the reason begins if a file that a row names is missing


@dataclass(frozen=True, kw_only=True)
class CheckConfig(SourceConfig):
    """What to look for in a data set."""

    validation: str = ""  # another data set: how many of its pictures and captions are in this one, too
    tokenizer: str = ""  # folder or Hub id of the LLM's tokenizer, to count tokens; "": count words
    max_tokens: int = 512  # count captions longer than this, in tokens (or words); the teacher truncates them
    max_broken: float = 0.01  # fraction of broken samples above which training stops
    show: int = 10  # how many broken samples, duplicate captions ... to list; --json lists all broken samples
    workers: int = 0  # processes; 0: one per core
    json: bool = False  # print one JSON object


COMMAND = Command(
    name="data check",
    example="llm2clip data check /data/cc3m --fields caption=short --tokenizer meta-llama/Llama-3.2-1B-Instruct",
    about="Read a data set once, decode every image, and report statistics and broken samples. The exit status is 1 if "
    "training on it would stop, else 0.",
    settings=CheckConfig,
    arguments="path",
    everyday="image-folder fields kinds languages validation tokenizer max-tokens max-broken show workers json",
    hidden="weight shuffle_window",
)


@dataclass
class Reading:
    """Counts and findings of some samples; readings add up."""

    broken: list[dict[str, str]] = field(default_factory=list)  # {"shard", "key", "reason"}
    without_captions: list[dict[str, str]] = field(default_factory=list)  # the same; intact, but no selected caption
    blank_captions: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # captions of each
    languages: Counter[str] = field(default_factory=Counter)
    unused_fields: Counter[str] = field(default_factory=Counter)  # fields with a text of words that is no caption
    nested_captions: int = 0  # samples with a caption that contains another one
    formats: Counter[str] = field(default_factory=Counter)  # JPEG, PNG, WEBP
    transparent: int = 0  # images with pixels that are not opaque
    image_bytes: int = 0
    caption_rows: list[np.ndarray] = field(default_factory=list)  # (n, 4) int64: hash, sample, tokens, hash of words
    sample_rows: list[np.ndarray] = field(default_factory=list)  # (n, 4) int64: hashes of key and image, width, height

    def add(self, other: Reading) -> None:
        """Add another reading to this one."""
        for each in dataclasses.fields(self):
            total = getattr(self, each.name)
            total += getattr(other, each.name)  # lists and counters grow in place
            setattr(self, each.name, total)


def _joined(rows: list[np.ndarray]) -> np.ndarray:
    """(n, 4) int64: the rows of all chunks."""
    return np.concatenate([np.zeros((0, 4), dtype=np.int64), *rows])


def main(argv: list[str]) -> int:
    """Exit status 1 if training on this data would stop, else 0."""
    config = COMMAND.parse(argv)
    report = check_data(config)
    print(json.dumps(report, indent=2, ensure_ascii=False) if config.json else as_text(report, config.show))
    return 0 if report["fit_for_training"] else 1


def check_data(config: CheckConfig) -> dict[str, Any]:
    """Read all of ``config.path`` and return the report that ``--json`` prints.

    Raises FileNotFoundError if there is no data, ValueError for an unknown format or a tokenizer that can't be loaded.
    """
    load_counter(config.tokenizer)  # fail here, not in a worker
    broken_shards: dict[str, str] = {}
    source = open_source(config, broken_shards)
    check_fields(source)
    report = build_report(config, source, broken_shards, reading := _read(source, config))
    if config.validation:
        other = open_source(dataclasses.replace(config, path=config.validation), {})
        report["validation"] = overlap(other, reading, _read(other, config))
    return report


def _read(source: Source, config: CheckConfig) -> Reading:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are parallel already
    chunks = [range(first, min(first + CHUNK, len(source))) for first in range(0, len(source), CHUNK)]
    parts = parallel(
        partial(read_samples, source, config), chunks, processes=min(config.workers or cores(), len(chunks))
    )
    reading = Reading()
    with progress_bar(total=len(source), label="data check", unit="samples") as bar:
        for part in parts:
            reading.add(part)
            bar.update(len(part.sample_rows[0]))
    return reading


@lru_cache
def load_counter(tokenizer: str) -> Callable[[str], int]:
    """Length of a caption: tokens of ``tokenizer``, special ones included, or words for "". Raises ValueError."""
    if not tokenizer:
        return lambda text: len(text.split())
    from transformers import AutoTokenizer

    try:
        if not Path(tokenizer).is_dir():
            check_hub_answers(tokenizer)
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except OSError as error:
        raise ValueError(f"cannot load the tokenizer {tokenizer!r}: {error}") from error
    return lambda text: len(loaded(text, verbose=False)["input_ids"])


def read_samples(source: Source, config: CheckConfig, numbers: range) -> Reading:
    """Read some samples of a source and decode their images at full size."""
    reading, count = Reading(), load_counter(config.tokenizer)
    caption_rows, sample_rows = [], []
    used = {item.name for item in source.fields}
    for number in numbers:
        key, captions, reason, image = "", (), "", (0, 0, 0)
        try:
            sample = source[number]
            key, captions = sample.key, sample.captions
            reading.blank_captions += sample.blank_captions
            texts = {name: text for name, text in sample.meta.items() if isinstance(text, str) and name not in used}
            # words, not a name, a hash or JSON
            reading.unused_fields.update(n for n, text in texts.items() if " " in text.strip() and text[0] not in "{[")
            image = _read_image(sample, reading)
        except BrokenSample as error:
            key, reason = error.key, error.reason
        except BrokenImage as error:
            reason = str(error)
        sample_rows.append((caption_hash(key), *image))
        caption_rows += _read_captions(captions, number, count, reading)
        identity = {"shard": source.locate(number)[0], "key": key}
        if reason:
            reading.broken.append({**identity, "reason": reason})
        elif not select_captions(captions, config.kinds, config.languages):
            reason = "no caption of the selected kinds and languages" if captions else "no caption"
            reading.without_captions.append({**identity, "reason": reason})
    reading.caption_rows.append(np.array(caption_rows, dtype=np.int64).reshape(-1, 4))
    reading.sample_rows.append(np.array(sample_rows, dtype=np.int64).reshape(-1, 4))
    return reading


def _read_image(sample: Sample, reading: Reading) -> tuple[int, int, int]:
    """Decode the image and count it; a hash, width and height. Raises BrokenSample or BrokenImage."""
    data = sample.read_image()
    image = open_header(data)
    image_format, size = image.format or "?", image.size
    transparent = has_transparency(image)
    load(image)
    reading.transparent += transparent
    reading.formats[image_format] += 1
    reading.image_bytes += len(data)
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big", signed=True), *size


def _read_captions(
    captions: tuple[Caption, ...], number: int, count: Callable[[str], int], reading: Reading
) -> Iterator[tuple[int, int, int, int]]:
    words = [words_of(caption.text) for caption in captions]
    distinct = {f" {text} " for text in words}
    reading.nested_captions += any(one != other and one in other for one in distinct for other in distinct)
    for caption, text in zip(captions, words, strict=True):
        reading.kinds[caption.kind] += 1
        reading.languages[caption.language] += 1
        yield caption_hash(caption.text), number, count(caption.text), caption_hash(text)


def build_report(
    config: CheckConfig, source: Source, broken_shards: dict[str, str], reading: Reading
) -> dict[str, Any]:
    """The report in plain JSON types."""
    captions, samples = _joined(reading.caption_rows), _joined(reading.sample_rows)
    images = samples[samples[:, 2] > 0]
    bad = len(reading.broken) + len(reading.without_captions)  # a sample is in at most one of the two lists
    fraction = bad / len(samples) if len(samples) else 1.0
    return {
        "path": config.path,
        "shards": len(source.shards),
        "samples": len(samples),
        "fit_for_training": not broken_shards and fraction <= config.max_broken,
        "broken_share": fraction,
        "max_broken": config.max_broken,
        "broken_shards": [{"shard": name, "reason": reason} for name, reason in broken_shards.items()],
        "broken": reading.broken,
        "without_captions": reading.without_captions,
        "captions": reading.kinds.total(),
        "captions_by_kind": dict(reading.kinds.most_common()),
        "captions_by_language": dict(reading.languages.most_common()),
        "empty_captions": reading.blank_captions,
        "duplicate_captions": _duplicate_captions(source, captions, config.show),
        "duplicate_images": len(images) - len(np.unique(images[:, 1])),
        "nested_captions": reading.nested_captions,
        "unused_fields": dict(reading.unused_fields.most_common()),
        "duplicate_keys": _duplicate_keys(source, samples[:, 0], config.show),
        "caption_lengths": _lengths(config, source, captions),
        "images": _images(reading, images[:, 2:]),
    }


def overlap(source: Source, train: Reading, validation: Reading) -> dict[str, Any]:
    """How much of ``source``, the validation data, is in the training data: files, and captions by their words."""
    samples, captions = _joined(validation.sample_rows), _joined(validation.caption_rows)
    same = np.flatnonzero(np.isin(samples[:, 1], _joined(train.sample_rows)[:, 1]) & (samples[:, 2] > 0)).tolist()
    return {
        "path": source.path,
        "samples": len(samples),
        "images_in_both": len(same),
        "examples": [source.key(number) for number in same[:3]],
        "captions": len(captions),
        "captions_in_both": int(np.isin(captions[:, 3], _joined(train.caption_rows)[:, 3]).sum()),
    }


def _duplicate_captions(source: Source, captions: np.ndarray, show: int) -> dict[str, Any]:
    pairs = np.unique(captions[:, :2], axis=0)  # a text of two kinds in one sample is no duplicate
    hashes, first, counts = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 1]
    most = []
    for row in order[:show].tolist():
        _, texts = source.captions(int(pairs[first[row], 1]))
        text = next(caption.text for caption in texts if caption_hash(caption.text) == hashes[row])
        most.append({"text": text, "samples": int(counts[row])})
    return {"texts": len(order), "samples": int(counts[order].sum()), "most_frequent": most}


def _duplicate_keys(source: Source, keys: np.ndarray, show: int) -> dict[str, Any]:
    """Keys that several samples have, in any shards; ``keys``: hashes."""
    hashes, counts = np.unique(keys, return_counts=True)
    duplicates = hashes[counts > 1]
    most = []
    for value in duplicates[:show]:
        numbers = np.flatnonzero(keys == value).tolist()
        shards = sorted({source.locate(number)[0] for number in numbers})[:show]
        most.append({"key": source.key(numbers[0]), "samples": len(numbers), "shards": shards})
    return {"keys": len(duplicates), "samples": int(counts[counts > 1].sum()), "examples": most}


def _lengths(config: CheckConfig, source: Source, captions: np.ndarray) -> dict[str, Any]:
    """Distribution of caption lengths; only the unit without captions."""
    unit, lengths = "tokens" if config.tokenizer else "words", captions[:, 2]
    if not len(lengths):
        return {"unit": unit}
    longest = int(captions[lengths.argmax(), 1])
    return {
        "unit": unit,
        "mean": round(float(lengths.mean()), 2),
        **{name: int(np.percentile(lengths, q)) for name, q in (("median", 50), ("p99", 99), ("max", 100))},
        "longest": {"shard": source.locate(longest)[0], "key": source.key(longest)},
        "limit": config.max_tokens,
        "over_limit": int((lengths > config.max_tokens).sum()),
    }


def _images(reading: Reading, sides: np.ndarray) -> dict[str, Any]:
    report: dict[str, Any] = {"whole": len(sides), "formats": dict(reading.formats.most_common())}
    if len(sides):
        report["mean_bytes"] = reading.image_bytes // len(sides)
        for values, name in zip(sides.T, ("width", "height"), strict=True):
            report[name] = {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}
    report["transparent"] = reading.transparent
    return report


def as_text(report: dict[str, Any], show: int) -> str:
    """The report as text, with at most ``show`` lines of each kind."""
    images, lengths = report["images"], report["caption_lengths"]
    lines = [
        f"{report['path']}: {report['samples']} samples in {report['shards']} shards, {report['captions']} captions",
        f"  kinds       {_counts(report['captions_by_kind'])}",
        f"  languages   {_counts(report['captions_by_language'])}",
        f"  images      {_counts(images['formats'])}",
    ]
    if images["whole"]:
        width, height = images["width"], images["height"]
        lines.append(
            f"  sizes       {width['min']} to {width['max']} x {height['min']} to {height['max']} pixels, median "
            f"{width['median']} x {height['median']}, {images['mean_bytes'] / 1000:.1f} kB"
        )
    if longest := lengths.get("longest"):
        lines.append(
            f"  {lengths['unit']:<11} mean {lengths['mean']}, median {lengths['median']}, 99 % to {lengths['p99']}, "
            f"longest {lengths['max']} ({longest['shard']}: {longest['key']}); {lengths['over_limit']} over "
            f"{lengths['limit']}"
        )
    lines += _problems(report, show) + [f"  note: {text}" for text in _notes(report)]
    verdict = "fit for training" if report["fit_for_training"] else "NOT fit for training"
    lines.append(f"{verdict}: {report['broken_share']:.2%} broken, {report['max_broken']:.2%} allowed")
    return "\n".join(map(printable, lines))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items()) or "none"


def _problems(report: dict[str, Any], show: int) -> list[str]:
    lines: list[str] = []
    broken = sorted(report["broken"], key=lambda one: one["reason"].startswith(NO_IMAGE))  # missing images last
    if missing := sum(one["reason"].startswith(NO_IMAGE) for one in broken):
        lines.append(f"  images not found: {missing}; set --image-folder to the folder that their paths start from")
    for title, entries in (
        ("broken shards", report["broken_shards"]),
        ("broken samples", broken),
        ("samples without a caption", report["without_captions"]),
    ):
        lines.append(f"  {title}: {len(entries)}")
        lines += [f"    {': '.join(one.values())}" for one in entries[:show]]
    texts, keys = report["duplicate_captions"], report["duplicate_keys"]
    lines.append(f"  empty captions: {report['empty_captions']}")
    lines.append(f"  duplicate captions: {texts['texts']} texts in {texts['samples']} samples")
    lines += [f"    {one['samples']} x {one['text'][:80]!r}" for one in texts["most_frequent"]]
    lines.append(f"  duplicate keys: {keys['keys']} keys in {keys['samples']} samples")
    lines += [f"    {one['samples']} x {one['key']!r} in {', '.join(one['shards'])}" for one in keys["examples"]]
    return lines


def _notes(report: dict[str, Any]) -> list[str]:
    """What stops no training and makes it worse."""
    notes, total = [], report["samples"]
    if copies := report["duplicate_images"]:
        notes.append(f"{copies} images are exact copies of others")
    if clear := report["images"]["transparent"]:
        notes.append(
            f"{clear} of {total} images are transparent: training reads what is stored below, mostly black; "
            "`llm2clip data make ... --background white` puts them on white"
        )
    if nested := report["nested_captions"]:
        notes.append(f"{nested} of {total} samples have a caption that contains another one: trivial pairs for stage 1")
    if unused := report["unused_fields"]:
        notes.append(f"fields with text that are not used as captions: {_counts(unused)}; --fields NAME=KIND uses them")
    if other := report.get("validation"):
        shown = f" ({', '.join(other['examples'])})" if other["examples"] else ""
        notes.append(
            f"of {other['path']}, {other['images_in_both']} of {other['samples']} images{shown} and "
            f"{other['captions_in_both']} of {other['captions']} captions are in the training data, too"
        )
    return notes
