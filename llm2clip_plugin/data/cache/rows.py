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


def shard_contents(
    source: Source, shard: Shard, *, images: bool = True
) -> tuple[list[str], list[tuple[Caption, ...]], list[int] | None]:
    """Keys, captions (none of a sample that can't be read) and checksums of the images (0 for one that can't be read).

    None instead of the checksums without ``images``, and where images are at a URL: all would be downloaded.
    """
    images = images and source.images_at_hand
    keys, captions, checks = [], [], []
    for number in range(shard.start, shard.start + shard.size):
        try:
            sample = source.with_image(number) if images else source[number]
        except BrokenSample as error:
            keys.append(error.key)
            captions.append(())
            checks.append(0)
            continue
        keys.append(sample.key)
        captions.append(sample.captions)
        try:
            checks.append(image_check(sample.read_image()) if images else 0)
        except BrokenSample:
            checks.append(0)
    return keys, captions, checks if images else None


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


def row_numbers(file: ShardFile, index: int, captions: Sequence[Caption], key: str) -> list[int]:
    """Row of each caption of a sample; ContractError if the sample, its ``key`` or a caption was not embedded."""
    if not 0 <= index < file.samples:
        raise ContractError(f"{file.path} has no sample {index} of {file.samples}; {redo(file.path)}")
    if key and file.key(index) != key:
        raise ContractError(
            f"{file.path}: sample {index} has key {key!r} in the data, {file.key(index)!r} in the cache; "
            f"{redo(file.path)}"
        )
    row_of = file.row_numbers(index)
    hashes = [caption_hash(caption.text) for caption in captions]
    for value, caption in zip(hashes, captions, strict=True):
        if value not in row_of:
            known = ", ".join(map(hash_hex, row_of)) or "none"
            text = caption.text if len(caption.text) <= 60 else caption.text[:57] + "..."
            raise ContractError(
                f"{file.path}: sample {file.key(index)!r}: caption {text!r} (hash {hash_hex(value)}) was not embedded; "
                f"cached caption hashes: {known}; if its data was changed and the file's time kept, `touch` that file; "
                f"{redo(file.path)}"
            )
    return [row_of[value] for value in hashes]
