"""The report of ``llm2clip data check``: one dictionary for machines, and the same as text."""

from collections import Counter
from typing import Any

import numpy as np

from llm2clip_plugin.data.check.reading import CheckConfig, Reading
from llm2clip_plugin.data.read_rate import describe_report, reading_report
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import caption_hash
from llm2clip_plugin.data.sources.rows import NO_IMAGE
from llm2clip_plugin.outside.values import printable

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
