"""The report of ``llm2clip data check``: one dictionary for machines, and the same as text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm2clip_plugin.data.check.reading import CheckConfig, Reading
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import caption_hash
from llm2clip_plugin.data.sources.rows import NO_IMAGE
from llm2clip_plugin.outside.values import printable

WHERE_IMAGES_ARE = "set --image-folder to the folder that the paths in the file start from"


def build_report(
    config: CheckConfig, source: Source, broken_shards: dict[str, str], reading: Reading
) -> dict[str, Any]:
    """The report in plain JSON types."""
    bad = len(reading.broken) + len(reading.without_captions)  # a sample is in at most one of the two lists
    fraction = bad / reading.samples if reading.samples else 1.0
    images = reading.rows("image_rows", 4)
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
        "captions": sum(by_kind.values()),
        "captions_by_kind": dict(by_kind.most_common()),
        "captions_by_language": dict(by_language.most_common()),
        "empty_captions": reading.blank_captions,
        "captions_with_invalid_utf8": reading.replaced_characters,
        "duplicate_captions": _duplicate_captions(source, reading.rows("caption_rows", 4), config.show),
        "duplicate_images": len(images) - len(np.unique(images[:, 0])),
        "nested_captions": reading.nested_captions,
        "unused_fields": dict(reading.unused_fields.most_common()),
        "duplicate_keys": _duplicate_keys(source, reading.rows("key_rows", 2), config.show),
        "caption_lengths": _lengths(config, source, reading.rows("caption_rows", 4)),
        "images": _images(config, reading, images[:, 2:]),
    }


def overlap(source: Source, train: Reading, validation: Reading) -> dict[str, Any]:
    """How much of ``source``, the validation data, is in the training data: files, and captions by their words."""
    images, captions = validation.rows("image_rows", 4), validation.rows("caption_rows", 4)
    same = images[np.isin(images[:, 0], train.rows("image_rows", 4)[:, 0]), 1].tolist()
    return {
        "path": source.path,
        "samples": validation.samples,
        "images_in_both": len(same),
        "examples": [source.key(number) for number in same[:3]],
        "captions": len(captions),
        "captions_in_both": int(np.isin(captions[:, 3], train.rows("caption_rows", 4)[:, 3]).sum()),
    }


def _duplicate_captions(source: Source, captions: np.ndarray, show: int) -> dict[str, Any]:
    """Texts that several samples have, with the most frequent ones."""
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
    """Keys that several samples have, in any shards."""
    hashes, counts = np.unique(keys[:, 0], return_counts=True)
    duplicates = hashes[counts > 1]
    most = []
    for value in duplicates[:show]:
        numbers = keys[keys[:, 0] == value, 1].tolist()
        shards = sorted({source.locate(number)[0] for number in numbers})
        most.append({"key": source.key(numbers[0]), "samples": len(numbers), "shards": shards[:show]})
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


def _images(config: CheckConfig, reading: Reading, sides: np.ndarray) -> dict[str, Any]:
    """Formats and sizes of the images that decode."""
    report: dict[str, Any] = {"whole": len(sides), "formats": dict(reading.formats.most_common())}
    if len(sides):
        report["mean_bytes"] = reading.image_bytes // len(sides)
        for values, name in zip(sides.T, ("width", "height"), strict=True):
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
    if "mean" in lengths:
        lines.append(
            f"  {lengths['unit']:<11} mean {lengths['mean']}, median {lengths['median']}, 99 % to {lengths['p99']}, "
            f"longest {lengths['max']} ({_label(lengths['longest'])}); {lengths['over_limit']} over {lengths['limit']}"
        )
    lines += _problems(report, show) + [f"  note: {text}" for text in _notes(report)]
    verdict = "fit for training" if report["fit_for_training"] else "NOT fit for training"
    lines.append(f"{verdict}: {report['broken_share']:.2%} broken, {report['max_broken']:.2%} allowed")
    return "\n".join(map(printable, lines))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items()) or "none"


def _label(sample: dict[str, str]) -> str:
    return f"{sample['shard']}: {sample['key']}"


def _problems(report: dict[str, Any], show: int) -> list[str]:
    lines, others = [], report["broken"]
    missing = [one for one in others if one["reason"].startswith(NO_IMAGE)]
    if len(missing) > 1:  # one mistake, so one line
        others = [one for one in others if one not in missing]
        first = missing[0]["reason"].removeprefix(NO_IMAGE)
        lines.append(f"  images that are not found: {len(missing)}, the first {first}: {WHERE_IMAGES_ARE}")
    shards = [f"{one['shard']}: {one['reason']}" for one in report["broken_shards"]]
    for title, entries in (
        ("broken shards", shards),
        ("broken samples", _reasons(others)),
        ("samples without a caption", _reasons(report["without_captions"])),
    ):
        lines.append(f"  {title}: {len(entries)}")
        lines += [f"    {text}" for text in entries[:show]]
    texts, keys = report["duplicate_captions"], report["duplicate_keys"]
    lines.append(f"  empty captions: {report['empty_captions']}; invalid UTF-8: {report['captions_with_invalid_utf8']}")
    lines.append(f"  duplicate captions: {texts['texts']} texts in {texts['samples']} samples")
    lines += [f"    {one['samples']} x {one['text'][:80]!r}" for one in texts["most_frequent"]]
    lines.append(f"  duplicate keys: {keys['keys']} keys in {keys['samples']} samples")
    lines += [f"    {one['samples']} x {one['key']!r} in {', '.join(one['shards'])}" for one in keys["examples"]]
    return lines


def _reasons(samples: Sequence[dict[str, str]]) -> list[str]:
    return [f"{_label(one)}: {one['reason']}" for one in samples]


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
