"""The embedding cache: one safetensors file per shard, and a manifest that names the teacher.

```
<directory>/manifest.json             CacheManifest; complete = false until embedding has finished
<directory>/<shard name>.safetensors  the rows of one shard
```

Tensors of a shard with N samples and R captions (blank captions have no row, equal captions of one
sample share one):

| name           | shape  | dtype        | meaning                                                 |
|----------------|--------|--------------|---------------------------------------------------------|
| embeddings     | (R, W) | float16/int8 | embedding = row x scale                                 |
| scales         | (R,)   | float32      | float16: 1 (large rows: a power of two); int8: max/127  |
| row_starts     | (N+1,) | int64        | sample i owns the rows row_starts[i] .. row_starts[i+1] |
| caption_hashes | (R,)   | int64        | first 64 bits of the caption's SHA-256                  |
| keys           | (K,)   | uint8        | the sample keys, UTF-8, one after the other             |
| key_starts     | (N+1,) | int64        | where each key starts                                   |
| row_checks     | (R,)   | int64        | CRC-32 of number, scale and row; compared at every read |

That a cache holds the captions of a source is proven once, by a digest of a shard's keys and
caption hashes that both have: the cache since it was embedded, the source in a file next to the
data, with the size and time of the shard's file, for each choice of caption fields. A start
compares the two. Where they differ, or the file has changed, the captions themselves are read: by
one of the processes that start together, while the others wait.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch

from llm2clip_plugin.contracts import (
    VALUE_BYTES,
    CacheManifest,
    TeacherIdentity,
)
from llm2clip_plugin.data.cache_file import (
    REDO,
    ShardFile,
    caption_rows,
    has_text,
    rows_digest,
    shard_captions,
)
from llm2clip_plugin.data.remote import stamps_of
from llm2clip_plugin.data.samples import Caption, cores, parallel
from llm2clip_plugin.data.sources import Shard, Source
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.hashes import canonical_json, sha256_text
from llm2clip_plugin.progress import track

OPEN_SHARDS = 256  # files that one process keeps open
# samples whose captions this process compares alone, without a pool
FEW_SAMPLES = 16384
# of a shard in the manifest
ENTRY = ("file", "samples", "captions", "truncated", "rows_sha256", "sha256", "bytes")

RENEW = (
    "rerun `llm2clip embed` with the options that made it, which embeds some captions again "
    "and renews the record"
)


class EmbeddingCache:
    """A complete cache, opened for reading. The files of the last shards used stay open."""

    def __init__(self, directory: Path, manifest: CacheManifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.width = manifest.width  # W of an embedding
        self.teacher = TeacherIdentity(**manifest.teacher)
        self.fingerprint = manifest.fingerprint  # of the teacher
        self.shard = lru_cache(OPEN_SHARDS)(self._open_shard)  # by name

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        expect_fingerprint: str | None = None,
        expect_width: int | None = None,
    ) -> EmbeddingCache:
        """Open a cache. Raises FileNotFoundError if there is none, ContractError with both values
        if its teacher or width differs, it is incomplete, or a shard is missing or has another
        size."""
        directory = Path(directory)
        manifest = _complete_manifest(directory / CacheManifest.FILE)
        teacher = TeacherIdentity(**manifest.teacher)
        fingerprints = (manifest.fingerprint, teacher.earlier().fingerprint)
        if expect_fingerprint is not None and expect_fingerprint not in fingerprints:
            remedy = "embed with that LLM, or use its cache"
            if teacher.is_earlier:
                remedy += f"; it is from before config.json was part of the fingerprint: {RENEW}"
            raise ContractError(
                f"{directory} has embeddings of {manifest.teacher['llm']}, "
                f"fingerprint {manifest.fingerprint}, expected {expect_fingerprint}; {remedy}"
            )
        if expect_width is not None and manifest.width != expect_width:
            raise ContractError(
                f"{directory} has embeddings of width {manifest.width} "
                f"({manifest.teacher['llm']}), expected {expect_width}; "
                "use the cache of the text adapter's LLM"
            )
        entries = manifest.shards.values()
        paths = [str(directory / entry["file"]) for entry in entries]
        for path, entry, stamp in zip(paths, entries, stamps_of(paths), strict=True):
            if stamp is None:
                raise ContractError(
                    f"{path} is missing, but the manifest lists it; {REDO}"
                )
            size, _ = stamp
            if size != entry["bytes"]:
                raise ContractError(
                    f"{path} has {size} bytes, expected {entry['bytes']}; {REDO}"
                )
        return cls(directory, manifest)

    def __reduce__(self) -> tuple[type[EmbeddingCache], tuple[Path, CacheManifest]]:
        # a worker opens the files itself
        return EmbeddingCache, (self.directory, self.manifest)

    def _open_shard(self, name: str) -> ShardFile:
        """A shard's file; raises ContractError if it is missing or differs from the manifest."""
        entry = self.manifest.shards.get(name)
        if entry is None:
            names = list(self.manifest.shards)
            listed = ", ".join(names[:5])
            if len(names) > 5:
                listed += ", ..."
            raise ContractError(
                f"{self.directory} has no shard {name!r}; known: {listed}; {REDO}"
            )
        path = self.directory / entry["file"]
        try:
            file = ShardFile(path)
        except FileNotFoundError as error:
            raise ContractError(
                f"{path} is missing, but the manifest lists it; {REDO}"
            ) from error
        actual = {
            "width": file.width,
            "samples": file.samples,
            "captions": file.captions,
            **file.meta,
        }
        expected = {
            "fingerprint": self.fingerprint,
            "width": self.width,
            "dtype": self.manifest.dtype,
            **entry,
            "truncated": str(entry["truncated"]),
        }
        if actual["fingerprint"] == self.manifest.earlier_fingerprint:
            # of a shard that was proven later
            expected["fingerprint"] = self.manifest.earlier_fingerprint
        wrong: list[str] = []
        for setting, value in expected.items():
            if setting in actual and actual[setting] != value:
                wrong.append(f"{setting} is {actual[setting]!r}, not {value!r}")
        if wrong:
            raise ContractError(
                f"{path} differs from the manifest: {'; '.join(wrong)}; {REDO}"
            )
        return file

    def rows(
        self,
        shard_name: str,
        index_in_shard: int,
        captions: Sequence[Caption],
        *,
        key: str = "",
    ) -> torch.Tensor:
        """(len(captions), W) float32: the embeddings of a sample's captions, in the captions'
        order. Raises ContractError if a caption, or ``key`` unless "", is not the one that was
        embedded."""
        file = self.shard(shard_name)
        return file.embeddings(file.row_numbers(index_in_shard, captions, key))

    def check(self, source: Source, *, full: bool = False) -> None:
        """Compare the cache with a source: shard names, counts, keys and the hash of every caption,
        which are read where digests don't show that they are the cache's, or with ``full``.
        ContractError at the first difference."""
        for shard in source.shards:
            entry = self.manifest.shards.get(shard.name)
            if entry is None or entry["samples"] != shard.size:
                file = self.shard(shard.name)  # raises for an unknown shard
                sizes = (
                    f"{shard.size} samples in {source.path}, "
                    f"{file.samples} when it was embedded"
                )
                raise ContractError(
                    f"{file.path}: shard {shard.name!r} has {sizes}; {REDO}"
                )
        if not full and not self._unproven(source):
            return
        results: dict[str, tuple[str, str]] = {}
        with source.lock(f"compare {source.path} with its embeddings"):
            shards = source.shards if full else self._unproven(source)
            processes = 1
            if sum(shard.size for shard in shards) > FEW_SAMPLES:
                processes = min(cores(), len(shards))
            compare = partial(self._compare_shard, source, full)
            compared = parallel(compare, shards, processes=processes)
            tracked = track(
                compared, total=len(shards), label="compare captions", unit="shards"
            )
            try:
                for shard, result in zip(shards, tracked, strict=True):
                    results[shard.name] = result
            finally:
                source.record_digests(results)

    def _unproven(self, source: Source) -> list[Shard]:
        """The shards without a recorded digest that says that the cache has their captions."""
        digests_by_name = source.known_digests()
        unproven: list[Shard] = []
        for shard in source.shards:
            in_cache = self.manifest.shards[shard.name]["rows_sha256"]
            if in_cache not in digests_by_name.get(shard.name, ()):
                unproven.append(shard)
        return unproven

    def _compare_shard(
        self, source: Source, full: bool, shard: Shard
    ) -> tuple[str, str]:
        """Digests of a shard's captions and of the cache's; ContractError at the first caption that
        the cache lacks."""
        keys, captions = shard_captions(source, shard)
        file = self.shard(shard.name)
        digest = rows_digest(keys, caption_rows(captions))
        in_cache = file.meta["rows_sha256"]
        if full or digest != in_cache:
            for index, (key, texts) in enumerate(zip(keys, captions, strict=True)):
                file.row_numbers(index, list(filter(has_text, texts)), key)
        return digest, in_cache

    def verify(self) -> None:
        """Read every byte and compare each shard's SHA-256 with the manifest's. Raises
        ContractError."""
        for name in self.manifest.shards:
            self.shard(name).verify()


def _complete_manifest(path: Path) -> CacheManifest:
    """A manifest; ContractError unless it is complete and agrees with itself."""
    manifest = CacheManifest.read(path)
    if not manifest.complete:
        raise ContractError(f"{path} is incomplete: embedding has not finished; {REDO}")
    for name, entry in manifest.shards.items():
        if missing := [value for value in ENTRY if value not in entry]:
            raise ContractError(
                f"{path}: the entry of shard {name!r} is missing {', '.join(missing)}; {REDO}"
            )
    with errors_about(path, fix=REDO):
        teacher = TeacherIdentity(**manifest.teacher)
    stated = (manifest.fingerprint, manifest.width)
    computed = (teacher.fingerprint, teacher.width)
    if stated != computed:
        raise ContractError(
            f"{path} was edited: fingerprint and width are {stated}, "
            f"its teacher's {computed}; {REDO}"
        )
    return manifest


def stored_teacher(path: Path) -> TeacherIdentity:
    """The teacher that a manifest names. Raises ContractError for a damaged entry."""
    with errors_about(path, fix=REDO):
        return TeacherIdentity(**CacheManifest.read(path).teacher)


def shard_bytes(
    samples: int, captions: int, width: int, dtype: str, *, key_bytes: int
) -> int:
    """Bytes of a cache's tensors."""
    row_bytes = width * VALUE_BYTES[dtype]
    caption_bytes = row_bytes + 4 + 8 + 8  # its scale, its hash and its checksum
    sample_bytes = key_bytes + 8 + 8  # the starts of its key and of its rows
    return captions * caption_bytes + samples * sample_bytes


def differences(stored: Mapping[str, object], yours: TeacherIdentity) -> str:
    """The settings that differ between two teachers, with both values."""
    ignored = {"adapter", "post_file"}  # adapter_sha256 and post say which ones
    if yours.is_earlier or not stored.get("config_sha256"):
        # which one of them does not know
        ignored |= {"config_sha256", "tokenizer_sha256"}
    settings: list[str] = []
    for name, value in vars(yours).items():
        if name not in ignored and stored.get(name) != value:
            settings.append(f"{name} {stored.get(name)!r} != {value!r}")
    return "; ".join(settings) or "the same settings"


def captions_digest(source: Source) -> str:
    """Over the keys and captions of all samples; those of a shard are read once, and their digest
    is recorded next to the data."""
    digests = source.known_digests()
    if any(shard.name not in digests for shard in source.shards):
        with source.lock(f"read the captions of {source.path}"):
            digests = source.known_digests()
            _add_digests(source, digests)
    return short_digest([digests[shard.name][0] for shard in source.shards])


def _add_digests(source: Source, digests: dict[str, list[str]]) -> None:
    """Read the captions of the shards that ``digests`` lacks, and record their digests."""
    shards = [shard for shard in source.shards if shard.name not in digests]
    processes = 1
    if sum(shard.size for shard in shards) > FEW_SAMPLES:
        processes = min(cores(), len(shards))
    computed = parallel(partial(_shard_digest, source), shards, processes=processes)
    tracked = track(computed, total=len(shards), label="read captions", unit="shards")
    fresh: dict[str, tuple[str, str]] = {}
    try:
        for shard, digest in zip(shards, tracked, strict=True):
            digests[shard.name] = [digest]
            fresh[shard.name] = (digest, digest)
    finally:
        source.record_digests(fresh)


def _shard_digest(source: Source, shard: Shard) -> str:
    """A digest of a shard's keys and captions."""
    keys, captions = shard_captions(source, shard)
    return rows_digest(keys, caption_rows(captions))


def source_digest(source: Source) -> str:
    """``3318333 samples in 332 shards (1f0c...)``: over the shards' names and sizes."""
    shards = [(shard.name, shard.size) for shard in source.shards]
    return f"{len(source)} samples in {len(shards)} shards ({short_digest(shards)})"


def cache_digest(cache: EmbeddingCache) -> str:
    """``6636666 captions (1f0c...)``: over the manifest, which has a hash of each shard's rows."""
    manifest = cache.manifest
    shards: dict[str, dict[str, object]] = {}
    for name, entry in manifest.shards.items():
        shards[name] = dict(entry)
        shards[name].pop("bytes", None)  # which checkpoints did not know at first
    digest = short_digest([manifest.lasting_fingerprint, manifest.dtype, shards])
    return f"{manifest.captions} captions ({digest})"


def short_digest(value: object) -> str:
    """The first digits of a JSON value's SHA-256."""
    return sha256_text(canonical_json(value))[:12]
