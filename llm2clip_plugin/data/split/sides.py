"""On which side of a split a sample is: a function of its key, or of one field of its JSON, and of nothing else.

So a sample stays on its side whatever the order and number of shards, and when others come or go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from llm2clip_plugin.contracts import canonical_json
from llm2clip_plugin.data.pool import cores, parallel
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import BrokenSample, caption_hash, words_of
from llm2clip_plugin.progress import track

SALT = "llm2clip data split\0"  # of the hash, so that it is independent of other uses of the same keys
FEW = 4  # shards that are read in this process


@dataclass(frozen=True, kw_only=True)
class ShardSides:
    """The sides of one shard's samples, and what is compared across the split."""

    held_out_N: np.ndarray  # bool, one a sample
    group_N: np.ndarray  # int64, hash of the value that decided
    caption_M: np.ndarray  # int64, hash of a caption's words
    owner_M: np.ndarray  # int64, number in the source of a caption's sample


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The sides of all samples, by shard."""

    shards: list[np.ndarray]  # bool, one a sample: True for validation
    samples: dict[str, int] = field(default_factory=dict)  # side -> samples
    groups: dict[str, int] = field(default_factory=dict)  # side -> distinct values that decided
    captions: dict[str, int] = field(default_factory=dict)  # side -> captions
    shared: int = 0  # captions of validation whose words are those of one in training
    shared_owners: tuple[int, ...] = ()  # some of their samples


def is_held_out(value: str, validation: float) -> bool:
    """Whether a value belongs to validation, a fraction of all values."""
    digest = hashlib.sha256((SALT + value).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < validation * 2.0**64


def decide(source: Source, validation: float, by: str, workers: int = 0) -> Sides:
    """Read every sample's JSON once and decide its side.

    by: field of a sample's JSON, all samples with one value being on one side; "": by key. Raises ValueError for a
    sample without that field, and if one side would be empty.
    """
    job: Callable[[int], ShardSides] = partial(_read_shard, source, validation, by)
    numbers = range(len(source.shards))
    parts = parallel(job, numbers, processes=min(workers or cores(), len(numbers)) if len(numbers) > FEW else 1)
    return _join(list(track(parts, total=len(numbers), label="data split: reading", unit="shards")), validation, by)


def _read_shard(source: Source, validation: float, by: str, number: int) -> ShardSides:
    shard = source.shards[number]
    values, captions, owners = [], [], []
    for sample in range(shard.start, shard.start + shard.size):
        value = _field(source, sample, by) if by else source.key(sample)
        values.append((is_held_out(value, validation), caption_hash(value)))
        for caption in source.captions(sample)[1]:
            if words := words_of(caption.text):
                captions.append(caption_hash(words))
                owners.append(sample)
    return ShardSides(
        held_out_N=np.array([side for side, _ in values], dtype=bool),
        group_N=np.array([group for _, group in values], dtype=np.int64),
        caption_M=np.array(captions, dtype=np.int64),
        owner_M=np.array(owners, dtype=np.int64),
    )


def _field(source: Source, sample: int, by: str) -> str:
    try:
        record = source.record(sample)
    except BrokenSample as error:
        raise ValueError(f"cannot read the field {by!r} of {error}; llm2clip data check lists all of these") from error
    if record.meta.get(by) in (None, ""):
        known = ", ".join(sorted(record.meta)) or "none"
        raise ValueError(
            f"sample {record.key!r} of shard {source.locate(sample)[0]!r} has no field {by!r} (--by); its fields: "
            f"{known}"
        )
    return canonical_json(record.meta[by])


def _join(parts: list[ShardSides], validation: float, by: str) -> Sides:
    held_out_N = np.concatenate([part.held_out_N for part in parts])
    group_N = np.concatenate([part.group_N for part in parts])
    caption_M = np.concatenate([part.caption_M for part in parts])
    owner_M = np.concatenate([part.owner_M for part in parts])
    samples = {"train": int((~held_out_N).sum()), "validation": int(held_out_N.sum())}
    if empty := [side for side, count in samples.items() if not count]:
        what = f"values of {by!r}" if by else "keys"
        raise ValueError(
            f"--validation {validation:g} of {len(np.unique(group_N))} distinct {what} leaves nothing for {empty[0]}; "
            f"choose a {'larger' if empty[0] == 'validation' else 'smaller'} fraction{' or another field' * bool(by)}"
        )
    held_out_M = held_out_N[owner_M] if len(owner_M) else np.zeros(0, dtype=bool)
    shared_M = held_out_M & np.isin(caption_M, caption_M[~held_out_M])
    return Sides(
        shards=[part.held_out_N for part in parts],
        samples=samples,
        groups={
            "train": len(np.unique(group_N[~held_out_N])),
            "validation": len(np.unique(group_N[held_out_N])),
        },
        captions={"train": int((~held_out_M).sum()), "validation": int(held_out_M.sum())},
        shared=int(shared_M.sum()),
        shared_owners=tuple(owner_M[shared_M][:3].tolist()),
    )
