"""The rows of a shard: which captions have one, the digest of them all, and where a caption's row is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llm2clip_plugin.contracts import ContractError, canonical_json, sha256_text
from llm2clip_plugin.data.cache.rerun import redo
from llm2clip_plugin.data.cache.shard_file import ShardFile, image_check
from llm2clip_plugin.data.sources.base import Shard, Source
from llm2clip_plugin.data.sources.records import BrokenSample, Caption, caption_hash, hash_hex


def has_text(caption: Caption) -> bool:
    """Whether a caption gets an embedding: blank ones don't."""
    return bool(caption.text.strip())


def shard_captions(source: Source, shard: Shard) -> tuple[list[str], list[tuple[Caption, ...]]]:
    """Keys and captions of a shard's samples; an unreadable sample has a key and no captions."""
    samples = [source.captions(number) for number in range(shard.start, shard.start + shard.size)]
    return [key for key, _ in samples], [captions for _, captions in samples]


def shard_contents(source: Source, shard: Shard) -> tuple[list[str], list[tuple[Caption, ...]], list[int] | None]:
    """As ``shard_captions``, and the checksum of each sample's image: 0 for one that can't be read.

    None instead of the checksums where images are at a URL: they would all be downloaded.
    """
    if not source.images_at_hand:
        return *shard_captions(source, shard), None
    keys, captions, checks = [], [], []
    for number in range(shard.start, shard.start + shard.size):
        try:
            sample = source.with_image(number)
        except BrokenSample as error:
            keys.append(error.key)
            captions.append(())
            checks.append(0)
            continue
        keys.append(sample.key)
        captions.append(sample.captions)
        try:
            checks.append(image_check(sample.read_image()))
        except BrokenSample:
            checks.append(0)
    return keys, captions, checks


def caption_rows(captions: Iterable[Sequence[Caption]]) -> list[tuple[int, int]]:
    """The rows of a shard: (index of the sample, caption hash) for each distinct caption with text, in order."""
    rows: list[tuple[int, int]] = []
    for index, of_sample in enumerate(captions):
        distinct = dict.fromkeys(caption_hash(caption.text) for caption in of_sample if has_text(caption))
        rows.extend((index, value) for value in distinct)
    return rows


def rows_digest(keys: Sequence[str], rows: Sequence[tuple[int, int]]) -> str:
    """SHA-256 of the keys and caption hashes that a shard's rows belong to, in order."""
    return sha256_text(canonical_json([list(keys), [[index, hash_hex(value)] for index, value in rows]]))


UNCOMPARED = "the data"  # what ``row_numbers`` calls a sample whose shard was proven by its size and time alone


def row_numbers(file: ShardFile, shard: str, index: int, captions: Sequence[Caption], key: str, data: str) -> list[int]:
    """Row of each caption of a sample; ContractError if the sample, its ``key`` or a caption was not embedded."""
    if not 0 <= index < file.samples:
        raise ContractError(
            f"{file.path} has no sample {index}: shard {shard!r} had {file.samples} samples when it was embedded; "
            f"{redo(file.path)}"
        )
    if key and file.key(index) != key:
        raise ContractError(
            f"{file.path}: sample {index} of shard {shard!r} has key {key!r} in {data}, {file.key(index)!r} in the "
            f"cache; {redo(file.path)}"
        )
    row_of = file.row_numbers(index)
    hashes = [caption_hash(caption.text) for caption in captions]
    for value, caption in zip(hashes, captions, strict=True):
        if value not in row_of:
            known = ", ".join(map(hash_hex, row_of)) or "none"
            text = caption.text if len(caption.text) <= 60 else caption.text[:57] + "..."
            reason = f"(hash {hash_hex(value)}) was not embedded" if has_text(caption) else "is blank"
            if data == UNCOMPARED:
                reason += f"; if shard {shard!r} was changed and its time kept, `touch` its file first"
            raise ContractError(
                f"{file.path}: sample {file.key(index)!r}: caption {text!r} {reason}; cached caption hashes: {known}; "
                f"{redo(file.path)}"
            )
    return [row_of[value] for value in hashes]
