"""``llm2clip data check DATA``: read a data set once, decode every image, and report statistics and
broken samples."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_plugin.data.samples import (
    BrokenSample,
    Caption,
    Sample,
    caption_hash,
    cores,
    holds_words,
    parallel,
    select_captions,
    words_of,
)
from llm2clip_plugin.data.sources import Source, SourceConfig, check_fields, open_source
from llm2clip_plugin.hub import check_hub_answers, split_revision
from llm2clip_plugin.options import Command, setting
from llm2clip_plugin.outside import printable, without_queries
from llm2clip_plugin.pictures import (
    BrokenImage,
    has_transparency,
    is_turned,
    load,
    open_header,
)
from llm2clip_plugin.pretrained import open_pretrained
from llm2clip_plugin.progress import progress_bar

CHUNK = 64  # samples that a worker reads in one task
# how the reason begins if a file that a row names is missing
NO_IMAGE = ("no image '", 'no image "')


@dataclass(frozen=True, kw_only=True)
class CheckConfig(SourceConfig):
    """What to look for in a data set."""

    validation: str = setting(
        "",
        help="another data set: how many of its pictures and captions are in this one, too",
    )
    tokenizer: str = setting(
        "",
        help='folder or Hub id of the LLM\'s tokenizer, to count tokens; "": count words',
    )
    trust_remote_code: bool = setting(
        False,
        help="run the Python code in the tokenizer's folder: read it first",
    )
    max_tokens: int = setting(
        512,
        help="count captions longer than this, in tokens (or words); the teacher truncates them",
    )
    max_broken: float = setting(
        0.01, help="fraction of broken samples above which training stops"
    )
    show: int = setting(
        10,
        help="how many broken samples, duplicate captions ... to list; --json lists all broken "
        "samples",
    )
    workers: int = setting(0, help="processes; 0: one per core")
    json: bool = setting(False, help="print one JSON object")


COMMAND = Command(
    name="data check",
    example="llm2clip data check /data/cc3m --fields caption=short "
    "--tokenizer meta-llama/Llama-3.2-1B-Instruct",
    about="Read a data set once, decode every image, and report statistics and broken samples. "
    "The exit status is 1 if training on it would stop, else 0.",
    settings=CheckConfig,
    arguments="path",
    everyday="image-folder fields kinds languages validation tokenizer max-tokens max-broken "
    "show workers json",
    hidden="weight shuffle_window",
)


@dataclass
class Reading:
    """Counts and findings of some samples; readings add up."""

    # {"shard", "key", "reason"}
    broken: list[dict[str, str]] = field(default_factory=list)
    # the same; intact, but no selected caption
    without_captions: list[dict[str, str]] = field(default_factory=list)
    # ("kind", "short"): captions of this kind
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    # (n, 4) int64: hash, sample, tokens, hash of words
    caption_rows: list[np.ndarray] = field(default_factory=list)
    # (n, 4) int64: hashes of key and image, width, height
    sample_rows: list[np.ndarray] = field(default_factory=list)

    def add(self, other: Reading) -> None:
        """Add another reading to this one."""
        for name, more in vars(other).items():
            total = getattr(self, name)
            total += more  # in place

    def of(self, subject: str) -> dict[str, int]:
        """The counts of a subject by name, the largest first."""
        counts: dict[str, int] = {}
        for (about, name), number in self.counts.most_common():
            if about == subject:
                counts[name] = number
        return counts


def _joined(rows: list[np.ndarray]) -> np.ndarray:
    """(n, 4) int64: the rows of all chunks."""
    return np.concatenate([np.zeros((0, 4), dtype=np.int64), *rows])


def main(argv: list[str]) -> int:
    """Exit status 1 if training on this data would stop, else 0."""
    config = COMMAND.parse(argv)
    report = check_data(config)
    if config.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print("\n".join(map(printable, as_text(report, config.show))))
    return 0 if report["fit_for_training"] else 1


def check_data(config: CheckConfig) -> dict[str, Any]:
    """The report that ``--json`` prints. FileNotFoundError if there is no data, ValueError for an
    unknown format."""
    # fail here, not in a worker
    load_counter(config.tokenizer, config.trust_remote_code)
    broken_shards: dict[str, str] = {}
    source = open_source(config, broken_shards)
    check_fields(source)
    reading = _read(source, config)
    report = build_report(config, source, broken_shards, reading)
    if config.validation:
        other = open_source(dataclasses.replace(config, path=config.validation), {})
        report["validation"] = overlap(other, reading, _read(other, config))
    return report


def _read(source: Source, config: CheckConfig) -> Reading:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are parallel already
    everything = range(len(source))
    starts = range(0, len(source), CHUNK)
    chunks = [everything[start : start + CHUNK] for start in starts]
    processes = min(config.workers or cores(), len(chunks))
    parts = parallel(partial(read_samples, source, config), chunks, processes=processes)
    reading = Reading()
    with progress_bar(total=len(source), label="data check", unit="samples") as bar:
        for part in parts:
            reading.add(part)
            bar.update(len(part.sample_rows[0]))
    return reading


@lru_cache
def load_counter(tokenizer: str, trust_remote_code: bool) -> Callable[[str], int]:
    """Length of a caption: tokens of ``tokenizer``, special ones included, or words for ""."""

    def count_words(text: str) -> int:
        return len(text.split())

    if not tokenizer:
        return count_words
    from transformers import AutoTokenizer

    name = tokenizer
    revision = None
    if not Path(tokenizer).is_dir():
        name, revision = split_revision(tokenizer)
        check_hub_answers(name, revision=revision)
    loaded = open_pretrained(
        AutoTokenizer, name, revision=revision, trust_remote_code=trust_remote_code
    )

    def count_tokens(text: str) -> int:
        return len(loaded(text, verbose=False)["input_ids"])

    return count_tokens


def read_samples(source: Source, config: CheckConfig, numbers: range) -> Reading:
    """Read some samples of a source and decode their images at full size."""
    reading = Reading()
    count = load_counter(config.tokenizer, config.trust_remote_code)
    caption_rows = []
    sample_rows = []
    for number in numbers:
        key = ""
        captions = ()
        reason = ""
        image = (0, 0, 0)
        try:
            sample = source[number]
            key = sample.key
            captions = sample.captions
            reading.counts["captions", "empty"] += sample.blank_captions
            _count_fields(sample, source, reading)
            image = _read_image(sample, reading)
        except BrokenSample as error:
            key = error.key
            reason = error.reason
        except BrokenImage as error:
            reason = str(error)
        sample_rows.append((caption_hash(key), *image))
        caption_rows += _read_captions(captions, number, count, reading)
        identity = {"shard": source.locate(number)[0], "key": key}
        if reason:
            reading.broken.append({**identity, "reason": reason})
        elif not select_captions(captions, config.kinds, config.languages):
            reason = "no caption"
            if captions:
                reason += " of the selected kinds and languages"
            reading.without_captions.append({**identity, "reason": reason})
    reading.caption_rows.append(np.array(caption_rows, dtype=np.int64).reshape(-1, 4))
    reading.sample_rows.append(np.array(sample_rows, dtype=np.int64).reshape(-1, 4))
    return reading


def _count_fields(sample: Sample, source: Source, reading: Reading) -> None:
    """Count the caption fields that a sample has, and the others that may be captions; a path with
    spaces is none."""
    for caption_field in source.fields:
        if sample.values.get(caption_field.name):
            reading.counts["field", f"{caption_field.name}={caption_field.kind}"] += 1
    used = {caption_field.name for caption_field in source.fields}
    used.add(source.config.image_field)
    for name, value in sample.meta.items():
        if name not in used and holds_words(value):
            reading.counts["unused field", name] += 1
            languages = value.keys() if isinstance(value, dict) else ()
            for language in languages:
                reading.counts["unused language", f"{name}.{language}"] += 1


def _read_image(sample: Sample, reading: Reading) -> tuple[int, int, int]:
    """Decode the image and count it; a hash, width and height. Raises BrokenSample, BrokenImage."""
    data = sample.read_image()
    image = open_header(data)
    image_format = image.format or "?"
    size = image.size
    transparent = has_transparency(image)
    if is_turned(image):
        reading.counts["images", "turned"] += 1
    load(image)
    if transparent:
        reading.counts["images", "transparent"] += 1
    reading.counts["images", "bytes"] += len(data)
    reading.counts["format", image_format] += 1
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big", signed=True), *size


def _read_captions(
    captions: tuple[Caption, ...],
    number: int,
    count: Callable[[str], int],
    reading: Reading,
) -> Iterator[tuple[int, int, int, int]]:
    words = [words_of(caption.text) for caption in captions]
    if contains_another(words):
        reading.counts["samples", "nested"] += 1
    for caption, text in zip(captions, words, strict=True):
        reading.counts.update([("kind", caption.kind), ("language", caption.language)])
        yield (
            caption_hash(caption.text),
            number,
            count(caption.text),
            caption_hash(text),
        )


def contains_another(texts: list[str]) -> bool:
    """Whether one of these texts contains all words of another one, in their order."""
    padded = {f" {text} " for text in texts}
    for text in padded:
        if any(text != other and text in other for other in padded):
            return True
    return False


def build_report(
    config: CheckConfig, source: Source, broken: dict[str, str], reading: Reading
) -> dict[str, Any]:
    """The report in plain JSON types; ``broken``: shards and why."""
    captions = _joined(reading.caption_rows)
    samples = _joined(reading.sample_rows)
    keys = np.column_stack([samples[:, 0], np.arange(len(samples))])
    # a sample is in at most one of the two lists
    bad = len(reading.broken) + len(reading.without_captions)
    fraction = bad / len(samples) if len(samples) else 1.0

    def text_of(number: int, hashed: int) -> str:
        texts = (caption.text for caption in source.captions(number)[1])
        return next(text for text in texts if caption_hash(text) == hashed)

    def key_of(number: int, hashed: int) -> str:
        return source.key(number)

    def is_missing(row: dict[str, str]) -> bool:
        return row["reason"].startswith(NO_IMAGE)

    broken_shards: list[dict[str, str]] = []
    for name, reason in broken.items():
        broken_shards.append({"shard": name, "reason": reason})
    is_image = samples[:, 2] > 0
    return {
        "path": without_queries(config.path),
        "shards": len(source.shards),
        "samples": len(samples),
        "captions": len(captions),
        "captions_by_kind": reading.of("kind"),
        "captions_by_language": reading.of("language"),
        "caption_lengths": _lengths(config, source, captions),
        "empty_captions": reading.counts["captions", "empty"],
        "duplicate_captions": _duplicates(captions[:, :2], config.show, text_of),
        "nested_captions": reading.counts["samples", "nested"],
        "fields": reading.of("field"),
        "unused_fields": reading.of("unused field"),
        "unused_languages": reading.of("unused language"),
        "duplicate_keys": _duplicates(keys, config.show, key_of),
        "images": _images(reading, samples[is_image]),
        "broken_shards": broken_shards,
        # missing images last
        "broken": sorted(reading.broken, key=is_missing),
        "without_captions": reading.without_captions,
        "broken_share": fraction,
        "max_broken": config.max_broken,
        "fit_for_training": not broken and fraction <= config.max_broken,
    }


def overlap(source: Source, train: Reading, validation: Reading) -> dict[str, Any]:
    """How much of ``source``, the validation data, is in the training data: files, and captions by
    their words."""
    samples = _joined(validation.sample_rows)
    captions = _joined(validation.caption_rows)
    is_image = samples[:, 2] > 0
    same_image = np.isin(samples[:, 1], _joined(train.sample_rows)[:, 1])
    same = np.flatnonzero(same_image & is_image).tolist()
    same_words = np.isin(captions[:, 3], _joined(train.caption_rows)[:, 3])
    return {
        "path": without_queries(source.path),
        "samples": len(samples),
        "images_in_both": len(same),
        "examples": [{"key": source.key(number)} for number in same[:3]],
        "captions": len(captions),
        "captions_in_both": int(same_words.sum()),
    }


def _duplicates(
    rows_N2: np.ndarray, show: int, value_of: Callable[[int, int], str]
) -> dict[str, Any]:
    """Values that several samples have; ``rows_N2``: hash and sample, ``value_of``: the value of a
    sample and hash."""
    # a text of two kinds in one sample is no duplicate
    pairs = np.unique(rows_N2, axis=0)
    hashes, first, counts = np.unique(
        pairs[:, 0], return_index=True, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 1]
    most = []
    for row in order[:show].tolist():
        sample = int(pairs[first[row], 1])
        value = value_of(sample, int(hashes[row]))
        most.append({"samples": int(counts[row]), "value": value})
    return {
        "values": len(order),
        "samples": int(counts[order].sum()),
        "most_frequent": most,
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    quantiles = {"min": 0, "median": 50, "p99": 99, "max": 100}
    return {name: int(np.percentile(values, q)) for name, q in quantiles.items()}


def _lengths(
    config: CheckConfig, source: Source, captions: np.ndarray
) -> dict[str, Any]:
    lengths = captions[:, 2]
    longest = ""
    if len(lengths):
        number = int(captions[lengths.argmax(), 1])
        shard, _ = source.locate(number)
        longest = f"{shard}: {source.key(number)}"
    return {
        "unit": "tokens" if config.tokenizer else "words",
        **_spread(lengths),
        "longest": longest,
        "limit": config.max_tokens,
        "over_limit": int((lengths > config.max_tokens).sum()),
    }


def _images(reading: Reading, rows: np.ndarray) -> dict[str, Any]:
    return {
        "whole": len(rows),
        "formats": reading.of("format"),
        "mean_bytes": reading.counts["images", "bytes"] // max(1, len(rows)),
        "width": _spread(rows[:, 2]),
        "height": _spread(rows[:, 3]),
        "transparent": reading.counts["images", "transparent"],
        "turned": reading.counts["images", "turned"],
        "exact_copies": len(rows) - len(np.unique(rows[:, 1])),
    }


def _unused(report: dict[str, Any]) -> str:
    """The fields that may be captions, with their languages, and how to use them."""
    languages = report["unused_languages"]
    fields = []
    options = list(report["fields"])
    for name in report["unused_fields"]:
        prefix = f"{name}."
        of_field = sorted(
            key.removeprefix(prefix) for key in languages if key.startswith(prefix)
        )
        fields.append(f"{name} ({' '.join(of_field)})" if of_field else name)
        options.append(f"{name}=short")
    return (
        f"fields with text are no captions: {', '.join(fields)}; "
        f"to use them, too: --fields {' '.join(options)}"
    )


def as_text(report: dict[str, Any], show: int) -> Iterator[str]:
    """The report for a person: contents, each problem that there is with at most ``show`` examples,
    the verdict."""
    yield from _contents(report)
    for number, title, examples in _problems(report):
        if number:
            yield f"  {number:,} {title}"
            for example in examples[:show]:
                parts = [str(part)[:200] for part in example.values()]
                yield f"    {': '.join(parts)}"
    verdict = (
        "fit for training" if report["fit_for_training"] else "NOT fit for training"
    )
    yield f"{verdict}: {report['broken_share']:.2%} broken, {report['max_broken']:.2%} allowed"


def _contents(report: dict[str, Any]) -> Iterator[str]:
    """How many samples, captions and images, and of which kinds and sizes."""
    images = report["images"]
    lengths = report["caption_lengths"]
    samples = f"{report['samples']:,} samples in {report['shards']:,} shards"
    yield f"{report['path']}: {samples}, {report['captions']:,} captions"
    counts_of = {
        "kinds": report["captions_by_kind"],
        "languages": report["captions_by_language"],
        "images": images["formats"],
    }
    for name, counts in counts_of.items():
        parts = ", ".join(f"{part} {number:,}" for part, number in counts.items())
        yield f"  {name:<11} {parts or 'none'}"
    validation = report.get("validation")
    if validation and not (
        validation["images_in_both"] + validation["captions_in_both"]
    ):
        yield f"  validation  nothing of {validation['path']} is in the training data"
    if images["whole"]:
        width = images["width"]
        height = images["height"]
        smallest = f"{width['min']} x {height['min']}"
        largest = f"{width['max']} x {height['max']}"
        median = f"{width['median']} x {height['median']}"
        sizes = f"{smallest} to {largest} pixels, median {median}"
        yield f"  sizes       {sizes}, {images['mean_bytes'] / 1000:.1f} kB"
    if report["captions"]:
        words = (
            "{min} to {max} ({longest}), median {median}, 99 % to "
            "{p99}; {over_limit} over {limit}"
        )
        yield f"  {lengths['unit']:<11} {words.format(**lengths)}"


Problem = tuple[int, str, list[dict[str, Any]]]  # count, what is wrong, examples


def _problems(report: dict[str, Any]) -> list[Problem]:
    """Everything that may be wrong; a count of 0 for what is not."""
    images = report["images"]
    texts = report["duplicate_captions"]
    keys = report["duplicate_keys"]
    unused = report["unused_fields"]
    missing = sum(row["reason"].startswith(NO_IMAGE) for row in report["broken"])
    no_image = (
        "images not found; set --image-folder to the folder that their paths start from"
    )
    same_texts = f"texts are those of several samples, {texts['samples']:,} in all"
    same_keys = f"keys are those of several samples, {keys['samples']:,} in all"
    transparent = (
        "images are transparent: training reads what is below; "
        "`llm2clip data make --background white` puts them on white"
    )
    turned = (
        "images are turned by their EXIF tag in viewers; training and LLaVA read them as they are "
        "stored: turn the files, as `mogrify -auto-orient *.jpg` does"
    )
    nested = (
        "samples have a caption that contains another one: trivial pairs for stage 1"
    )
    problems: list[Problem] = [
        (missing, no_image, []),
        (len(report["broken_shards"]), "broken shards", report["broken_shards"]),
        (len(report["broken"]), "broken samples", report["broken"]),
        (
            len(report["without_captions"]),
            "samples without a caption",
            report["without_captions"],
        ),
        (report["empty_captions"], "empty captions", []),
        (texts["values"], same_texts, texts["most_frequent"]),
        (keys["values"], same_keys, keys["most_frequent"]),
        (images["exact_copies"], "images are exact copies of others", []),
        (images["transparent"], transparent, []),
        (images["turned"], turned, []),
        (report["nested_captions"], nested, []),
        (len(unused), _unused(report), []),
    ]
    if validation := report.get("validation"):
        in_both = f"of {validation['path']} are in the training data, too"
        same_images = f"of {validation['samples']:,} images {in_both}"
        same_captions = f"of {validation['captions']:,} captions {in_both}"
        problems.append(
            (validation["images_in_both"], same_images, validation["examples"])
        )
        problems.append((validation["captions_in_both"], same_captions, []))
    return problems
