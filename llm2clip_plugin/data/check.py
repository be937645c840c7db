"""The report of ``llm2clip data check``: one dictionary for machines, and the same as text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_plugin.console import track
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
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import check_fields, open_source
from llm2clip_plugin.data.sources.rows import NO_IMAGE
from llm2clip_plugin.data.sources.tars import describe_report, reading_report
from llm2clip_plugin.data.workers import cores, map_in_order, process_pool
from llm2clip_plugin.files import printable
from llm2clip_plugin.hub import check_hub_answers
from llm2clip_plugin.options import Command

# The options of ``llm2clip data check``.


@dataclass(frozen=True, kw_only=True)
class CheckConfig(SourceConfig):
    """What to look for in a data set."""

    validation: str = ""  # another data set: how many of its pictures and captions are in this one, too
    tokenizer: str = ""  # folder or Hub id of the LLM's tokenizer, to count tokens; "": count words
    max_tokens: int = 512  # count captions longer than this, in tokens (or words); the teacher truncates them
    small_side: int = 32  # count images with a side shorter than this, in pixels
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


# Read every sample of a source once and decode its image at full size, in several processes.

CHUNK = 64  # samples that a worker reads in one task


@dataclass
class Reading:
    """Counts and findings of some samples; readings add up."""

    samples: int = 0
    broken: list[dict[str, str]] = field(default_factory=list)  # {"shard", "key", "reason"}
    without_captions: list[dict[str, str]] = field(default_factory=list)  # the same; intact, but no selected caption
    blank_captions: int = 0
    replaced_characters: int = 0  # captions with U+FFFD, which replaces invalid UTF-8
    captions: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, language) -> captions
    unused_fields: Counter[str] = field(default_factory=Counter)  # fields with a text of words that is no caption
    nested_captions: int = 0  # samples with a caption that contains another one
    caption_rows: list[np.ndarray] = field(default_factory=list)  # (n, 4) int64: hash, sample, tokens, hash of words
    key_rows: list[np.ndarray] = field(default_factory=list)  # (n, 2) int64: hash of the key, sample number
    formats: Counter[str] = field(default_factory=Counter)  # JPEG, PNG, WEBP
    image_rows: list[np.ndarray] = field(default_factory=list)  # (n, 2) int64: hash of the file, sample number
    transparent: int = 0  # images with pixels that are not opaque
    side_rows: list[np.ndarray] = field(default_factory=list)  # (n, 2) int32: width, height
    image_bytes: int = 0

    def add(self, other: Reading) -> None:
        """Add another reading to this one."""
        self.samples += other.samples
        self.blank_captions += other.blank_captions
        self.replaced_characters += other.replaced_characters
        self.image_bytes += other.image_bytes
        self.transparent += other.transparent
        self.nested_captions += other.nested_captions
        self.unused_fields += other.unused_fields
        self.image_rows += other.image_rows
        self.broken += other.broken
        self.without_captions += other.without_captions
        self.caption_rows += other.caption_rows
        self.key_rows += other.key_rows
        self.side_rows += other.side_rows
        self.captions += other.captions
        self.formats += other.formats


def read_all(source: Source, config: CheckConfig) -> Iterator[Reading | None]:
    """A reading of each chunk, followed by None for each of its other samples, so that progress counts samples."""
    starts = range(0, len(source), CHUNK)
    chunks = (range(first, min(first + CHUNK, len(source))) for first in starts)
    workers = min(config.workers or cores(), len(starts))
    if workers <= 1:
        yield from _spread(map(partial(read_samples, source, config, load_counter(config.tokenizer)), chunks))
        return
    with process_pool(workers, _begin_worker, (source, config)) as pool:
        yield from _spread(map_in_order(pool, _read_in_worker, chunks, ahead=8 * workers))


def _spread(readings: Iterator[Reading]) -> Iterator[Reading | None]:
    for reading in readings:
        yield reading
        for _ in range(reading.samples - 1):
            yield None


_worker: Callable[[range], Reading]  # read_samples with the arguments that don't change; set in each worker process


def _begin_worker(source: Source, config: CheckConfig) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = partial(read_samples, source, config, load_counter(config.tokenizer))


def _read_in_worker(numbers: range) -> Reading:
    return _worker(numbers)


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


def read_samples(source: Source, config: CheckConfig, count: Callable[[str], int], numbers: range) -> Reading:
    """Read some samples of a source and decode their images at full size."""
    reading = Reading(samples=len(numbers))
    caption_rows, key_rows, image_rows, sides = [], [], [], []
    used = {item.name for item in source.fields}
    for number in numbers:
        key, captions, reason = "", (), ""
        try:
            sample = source.with_image(number)
            key, captions = sample.key, sample.captions
            reading.blank_captions += sample.blank_captions
            reading.unused_fields.update(name for name in sample.meta.keys() - used if _is_text(sample.meta[name]))
            size, value = _read_image(sample, reading)
            sides.append(size)
            image_rows.append((value, number))
        except BrokenSample as error:
            key, reason = error.key, error.reason
        except BrokenImage as error:
            reason = str(error)
        key_rows.append((caption_hash(key), number))
        words = [words_of(caption.text) for caption in captions]
        caption_rows += [
            (caption_hash(caption.text), number, count(caption.text), caption_hash(text))
            for caption, text in zip(captions, words, strict=True)
        ]
        distinct = {f" {text} " for text in words}
        reading.nested_captions += any(one != other and one in other for one in distinct for other in distinct)
        _count_captions(captions, reading)
        identity = {"shard": source.locate(number)[0], "key": key}
        if reason:
            reading.broken.append({**identity, "reason": reason})
        elif not select_captions(captions, config.kinds, config.languages):
            reason = "no caption of the selected kinds and languages" if captions else "no caption"
            reading.without_captions.append({**identity, "reason": reason})
    reading.caption_rows.append(np.array(caption_rows, dtype=np.int64).reshape(-1, 4))
    reading.image_rows.append(np.array(image_rows, dtype=np.int64).reshape(-1, 2))
    reading.key_rows.append(np.array(key_rows, dtype=np.int64).reshape(-1, 2))
    reading.side_rows.append(np.array(sides, dtype=np.int32).reshape(-1, 2))
    return reading


def _is_text(value: object) -> bool:
    """Whether a field may be a caption: words, not a name, a hash or JSON."""
    return isinstance(value, str) and " " in value.strip() and not value.startswith(("{", "["))


def _read_image(sample: Sample, reading: Reading) -> tuple[tuple[int, int], int]:
    """Decode the image, count it; its width and height, and a hash. Raises BrokenSample or BrokenImage."""
    data = sample.read_image()
    image = open_header(data)
    image_format, size = image.format or "?", image.size
    transparent = has_transparency(image)
    load(image)
    reading.transparent += transparent
    reading.formats[image_format] += 1
    reading.image_bytes += len(data)
    return size, int.from_bytes(hashlib.sha256(data).digest()[:8], "big", signed=True)


def _count_captions(captions: tuple[Caption, ...], reading: Reading) -> None:
    for caption in captions:
        reading.captions[caption.kind, caption.language] += 1
        reading.replaced_characters += "\ufffd" in caption.text


EDGES = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # lower ends of the histogram's bins
WHERE_IMAGES_ARE = "set --image-folder to the folder that the paths in the file start from"
BAR = 40  # characters of the longest bar


def build_report(
    config: CheckConfig, source: Source, broken_shards: dict[str, str], reading: Reading
) -> dict[str, Any]:
    """The report in plain JSON types."""
    bad = len(reading.broken) + len(reading.without_captions)  # a sample is in at most one of the two lists
    fraction = bad / reading.samples if reading.samples else 1.0
    captions = np.concatenate([np.zeros((0, 4), dtype=np.int64), *reading.caption_rows])
    keys = np.concatenate([np.zeros((0, 2), dtype=np.int64), *reading.key_rows])
    by_kind, by_language = Counter(), Counter()
    for (kind, language), number in reading.captions.items():
        by_kind[kind] += number
        by_language[language] += number
    return {
        "path": config.path,
        "shards": len(source.shards),
        "samples": reading.samples,
        "fit_for_training": not broken_shards and fraction <= config.max_broken,
        "broken_share": fraction,
        "max_broken": config.max_broken,
        "broken_shards": [{"shard": name, "reason": reason} for name, reason in broken_shards.items()],
        "broken": reading.broken,
        "without_captions": reading.without_captions,
        "captions": len(captions),
        "captions_by_kind": dict(by_kind.most_common()),
        "captions_by_language": dict(by_language.most_common()),
        "empty_captions": reading.blank_captions,
        "captions_with_invalid_utf8": reading.replaced_characters,
        "duplicate_captions": _duplicate_captions(source, captions, config.show),
        "duplicate_images": _duplicates(_rows_of(reading.image_rows)),
        "nested_captions": reading.nested_captions,
        "unused_fields": dict(reading.unused_fields.most_common()),
        "duplicate_keys": _duplicate_keys(source, keys, config.show),
        "caption_lengths": _lengths(config, source, captions),
        "images": _images(config, reading),
        "reading": reading_report(source, reading.image_bytes / max(1, sum(reading.formats.values()))),
    }


def _rows_of(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros((0, 2), dtype=np.int64), *parts])


def _duplicates(rows: np.ndarray) -> int:
    """Samples whose hash, in the first column, is that of an earlier one."""
    return len(rows) - len(np.unique(rows[:, 0]))


def overlap(source: Source, train: Reading, validation: Reading) -> dict[str, Any]:
    """How much of ``source``, the validation data, is in the training data: files, and captions by their words."""
    images, known = _rows_of(validation.image_rows), _rows_of(train.image_rows)[:, 0]
    captions = np.concatenate([np.zeros((0, 4), dtype=np.int64), *validation.caption_rows])
    words = np.concatenate([np.zeros((0, 4), dtype=np.int64), *train.caption_rows])[:, 3]
    same = images[np.isin(images[:, 0], known), 1].tolist()
    return {
        "path": source.path,
        "samples": validation.samples,
        "images_in_both": len(same),
        "examples": [source.captions(number)[0] for number in same[:3]],
        "captions": len(captions),
        "captions_in_both": int(np.isin(captions[:, 3], words).sum()),
    }


def _duplicate_captions(source: Source, captions: np.ndarray, show: int) -> dict[str, Any]:
    """Texts that several samples have, with the most frequent ones."""
    pairs = np.unique(captions[:, :2], axis=0)  # a text of two kinds in one sample is no duplicate
    hashes, first, counts = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 1]
    most = []
    for row in order[:show].tolist():
        number = int(pairs[first[row], 1])
        text = _text_of(source, number, int(hashes[row]))
        most.append({"text": text, "samples": int(counts[row])})
    return {"texts": len(order), "samples": int(counts[order].sum()), "most_frequent": most}


def _text_of(source: Source, number: int, value: int) -> str:
    """The caption of a sample whose hash is ``value``."""
    return next(caption.text for caption in source.captions(number)[1] if caption_hash(caption.text) == value)


def _duplicate_keys(source: Source, keys: np.ndarray, show: int) -> dict[str, Any]:
    """Keys that several samples have, in any shards."""
    hashes, counts = np.unique(keys[:, 0], return_counts=True)
    duplicates = hashes[counts > 1]
    most = []
    for value in duplicates[:show]:
        numbers = keys[keys[:, 0] == value, 1].tolist()
        shards = sorted({source.locate(number)[0] for number in numbers})
        most.append({"key": source.captions(numbers[0])[0], "samples": len(numbers), "shards": shards[:show]})
    return {"keys": len(duplicates), "samples": int(counts[counts > 1].sum()), "examples": most}


def _lengths(config: CheckConfig, source: Source, captions: np.ndarray) -> dict[str, Any]:
    """Distribution of caption lengths."""
    unit = "tokens" if config.tokenizer else "words"
    lengths = captions[:, 2]
    if not len(lengths):
        return {"unit": unit, "histogram": []}
    bins = np.searchsorted(EDGES, lengths, side="right") - 1
    ends = [*(edge - 1 for edge in EDGES[1:]), None]
    histogram = [
        {"from": EDGES[number], "to": ends[number], "captions": int((bins == number).sum())}
        for number in range(int(bins.max()) + 1)
    ]
    longest = int(captions[lengths.argmax(), 1])
    shard, key = source.locate(longest)[0], source.captions(longest)[0]
    return {
        "unit": unit,
        "mean": round(float(lengths.mean()), 2),
        **{name: int(np.percentile(lengths, q)) for name, q in (("median", 50), ("p99", 99), ("max", 100))},
        "longest": {"shard": shard, "key": key},
        "limit": config.max_tokens,
        "over_limit": int((lengths > config.max_tokens).sum()),
        "histogram": histogram,
    }


def _images(config: CheckConfig, reading: Reading) -> dict[str, Any]:
    """Formats and sizes of the images that decode."""
    sides = np.concatenate([np.zeros((0, 2), dtype=np.int32), *reading.side_rows])
    report: dict[str, Any] = {"whole": len(sides), "formats": dict(reading.formats.most_common())}
    if len(sides):
        report["mean_bytes"] = reading.image_bytes // len(sides)
        for axis, name in enumerate(("width", "height")):
            values = sides[:, axis]
            report[name] = {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}
    report["transparent"] = reading.transparent
    report["small_side"] = config.small_side
    report["small"] = int((sides.min(axis=1) < config.small_side).sum()) if len(sides) else 0
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
            f"{width['median']} x {height['median']}, {images['mean_bytes'] / 1000:.1f} kB; "
            f"{images['small']} smaller than {images['small_side']} pixels"
        )
    lines.append(f"  reading     {describe_report(report['reading'])}")
    lines += _length_lines(lengths) + _problem_lines(report, show)
    verdict = "fit for training" if report["fit_for_training"] else "NOT fit for training"
    lines.append(f"{verdict}: {report['broken_share']:.2%} broken, {report['max_broken']:.2%} allowed")
    return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items()) or "none"


def _length_lines(lengths: dict[str, Any]) -> list[str]:
    if not lengths["histogram"]:
        return []
    unit = lengths["unit"]
    lines = [
        f"  caption lengths in {unit}: mean {lengths['mean']}, median {lengths['median']}, 99 % to {lengths['p99']}, "
        f"longest {lengths['max']} ({_label(lengths['longest'])}); "
        f"{lengths['over_limit']} over {lengths['limit']}"
    ]
    largest = max(bin["captions"] for bin in lengths["histogram"])
    for bin in lengths["histogram"]:
        span = f"{bin['from']}-{bin['to']}" if bin["to"] else f"{bin['from']}+"
        bar = "#" * -(-bin["captions"] * BAR // largest)
        lines.append(f"    {span:>9} {bin['captions']:>9} {bar}")
    return lines


def _label(sample: dict[str, str]) -> str:
    return f"{printable(sample['shard'])}: {printable(sample['key'])}"


def _problem_lines(report: dict[str, Any], show: int) -> list[str]:
    lines: list[str] = []
    missing = [one for one in report["broken"] if one["reason"].startswith(NO_IMAGE)]
    others = [one for one in report["broken"] if one not in missing] if len(missing) > 1 else report["broken"]
    if len(missing) > 1:  # one mistake, so one line
        first = printable(missing[0]["reason"].removeprefix(NO_IMAGE))
        lines.append(f"  images that are not found: {len(missing)}, the first {first}: {WHERE_IMAGES_ARE}")
    for title, entries in (
        (
            "broken shards",
            [f"{printable(one['shard'])}: {printable(one['reason'])}" for one in report["broken_shards"]],
        ),
        ("broken samples", [f"{_label(one)}: {printable(one['reason'])}" for one in others]),
        (
            "samples without a caption",
            [f"{_label(one)}: {printable(one['reason'])}" for one in report["without_captions"]],
        ),
    ):
        lines.append(f"  {title}: {len(entries)}")
        lines += [f"    {text}" for text in entries[:show]]
        lines += [f"    ... and {len(entries) - show} more"] if len(entries) > show else []
    texts, keys = report["duplicate_captions"], report["duplicate_keys"]
    lines.append(f"  empty captions: {report['empty_captions']}; invalid UTF-8: {report['captions_with_invalid_utf8']}")
    lines.append(f"  duplicate captions: {texts['texts']} texts in {texts['samples']} samples")
    lines += [f"    {one['samples']} x {one['text'][:80]!r}" for one in texts["most_frequent"]]
    lines.append(f"  duplicate keys: {keys['keys']} keys in {keys['samples']} samples")
    lines += [
        f"    {one['samples']} x {one['key']!r} in {printable(', '.join(one['shards']))}" for one in keys["examples"]
    ]
    return lines + _notes(report)


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
        notes.append(
            f"{nested} of {total} samples have a caption that contains another one: trivial pairs for stage 1, whose "
            "loss is then near 0"
        )
    if unused := report["unused_fields"]:
        fields = ", ".join(f"{printable(name)} ({count})" for name, count in unused.items())
        notes.append(f"fields with text that are not used as captions: {fields}; --fields NAME=KIND uses them")
    if other := report.get("validation"):
        shown = f" ({printable(', '.join(other['examples']))})" if other["examples"] else ""
        notes.append(
            f"of {other['path']}, {other['images_in_both']} of {other['samples']} images{shown} and "
            f"{other['captions_in_both']} of {other['captions']} captions are in the training data, too"
        )
    return [f"  note: {text}" for text in notes]


# ``llm2clip data check DATA``: read a data set once, decode every image, and report statistics and broken samples.


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
    reading = Reading()
    for part in track(read_all(source, config), total=len(source), label="data check", unit="samples"):
        if part is not None:
            reading.add(part)
    return reading
