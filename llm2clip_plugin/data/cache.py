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

import hashlib
import json
import logging
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from llm2clip_plugin.atomic import atomic_file
from llm2clip_plugin.contracts import (
    CACHE_DTYPES,
    VALUE_BYTES,
    CacheManifest,
    TeacherIdentity,
    shard_file,
)
from llm2clip_plugin.data.remote import RetryingFile, stamps_of
from llm2clip_plugin.data.samples import Caption, caption_hash, cores, hash_hex, parallel
from llm2clip_plugin.data.sources import Shard, Source
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.hashes import canonical_json, sha256_text
from llm2clip_plugin.options import unknown
from llm2clip_plugin.progress import track
from llm2clip_plugin.run_folder import PROGRESS, tell_job
from llm2clip_plugin.safetensors_header import parse_header

log = logging.getLogger(__name__)

OPEN_SHARDS = 256  # files that one process keeps open
FEW_SAMPLES = 16384  # samples whose captions this process compares alone, without a pool
# of a shard in the manifest
ENTRY = ("file", "samples", "captions", "truncated", "rows_sha256", "sha256", "bytes")
INT8_COSINE = 0.999  # lowest cosine similarity allowed between a row and its int8 form
FLOAT16_SAFE = 32768.0  # larger rows are stored halved until they fit (float16 ends at 65504)
REDO = "rerun `llm2clip embed` with the options that made it: it embeds what is missing or damaged"

RENEW = (
    "rerun `llm2clip embed` with the options that made it, which embeds some captions again "
    "and renews the record"
)

# of a shard's file
TENSORS = ("caption_hashes", "embeddings", "key_starts", "keys", "row_starts", "scales")
CHECKS = ("row_checks",)
METADATA = ("fingerprint", "dtype", "rows_sha256", "sha256", "checks_sha256", "truncated")
META = "llm2clip"  # the metadata entry that holds METADATA as JSON
DTYPES = {"F16": "<f2", "F32": "<f4", "I8": "i1", "U8": "u1", "I64": "<i8"}  # safetensors' names


def tensors_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the tensors' bytes in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def row_check(row_W: np.ndarray, scale: float, number: int) -> int:
    """Checksum of a stored row with its scale and its number in the shard."""
    return zlib.crc32(row_W.data, zlib.crc32(struct.pack("<fq", scale, number)))


def has_text(caption: Caption) -> bool:
    """Whether a caption gets an embedding: blank ones don't."""
    return bool(caption.text.strip())


def caption_rows(captions: Iterable[Sequence[Caption]]) -> list[tuple[int, int]]:
    """The rows of a shard: (index of the sample, caption hash) for each distinct caption with text,
    in order."""
    rows: list[tuple[int, int]] = []
    for index, of_sample in enumerate(captions):
        distinct = dict.fromkeys(
            caption_hash(caption.text) for caption in of_sample if has_text(caption)
        )
        rows.extend((index, value) for value in distinct)
    return rows


def rows_digest(keys: Sequence[str], rows: Sequence[tuple[int, int]]) -> str:
    """SHA-256 of the keys and caption hashes that a shard's rows belong to, in order."""
    return sha256_text(
        canonical_json([list(keys), [[index, hash_hex(value)] for index, value in rows]])
    )


class ShardFile:
    """One shard's file, read by position: one open file, and transient errors are retried. Raises
    ContractError if the file is truncated or not a shard of a cache, FileNotFoundError if there is
    none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = RetryingFile(path)
        try:
            self.size = self._file.size()  # bytes
            header = parse_header(self.size, self._file.read)
            self._data_start = header.data_start
            self._entries = header.entries
            if wrong := {*TENSORS, *CHECKS} ^ {*header.entries}:
                raise ValueError(f"unknown or missing tensors: {', '.join(sorted(wrong))}")
            self.meta: dict[str, str] = json.loads(header.metadata[META])
            if missing := {*METADATA} - {*self.meta}:
                raise ValueError(f"its metadata is missing {', '.join(sorted(missing))}")
            self.captions, self.width = self._entries["embeddings"].shape
            self.samples = self._entries["row_starts"].shape[0] - 1
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ContractError(
                f"{path} is truncated or no shard of an embedding cache ({error}); {REDO}"
            ) from error

    def __getitem__(self, name: str) -> np.ndarray:
        """An entire tensor of the file."""
        return self._read(name, 0, self._entries[name].shape[0])

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        """A tensor from one index of its first axis to another."""
        entry = self._entries[name]
        dtype = np.dtype(DTYPES[entry.dtype])
        shape = (stop - start, *entry.shape[1:])
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        size = shape[0] * row_bytes
        data = self._file.read(size, self._data_start + entry.start + start * row_bytes)
        if len(data) != size:
            raise ContractError(f"{self.path} was truncated while it was read; {REDO}")
        return np.frombuffer(data, dtype).reshape(shape)

    def key(self, index: int) -> str:
        """The key of a sample."""
        start, stop = self._read("key_starts", index, index + 2).tolist()
        return self._read("keys", start, stop).tobytes().decode()

    def row_numbers(self, index: int, captions: Sequence[Caption], key: str) -> list[int]:
        """Row of each caption of a sample; ContractError if the sample, its ``key`` or a caption
        was not embedded."""
        if not 0 <= index < self.samples:
            raise ContractError(f"{self.path} has no sample {index} of {self.samples}; {REDO}")
        if key and self.key(index) != key:
            keys = f"key {key!r} in the data, {self.key(index)!r} in the cache"
            raise ContractError(f"{self.path}: sample {index} has {keys}; {REDO}")
        start, stop = self._read("row_starts", index, index + 2).tolist()
        stored_hashes = self._read("caption_hashes", start, stop).tolist()
        row_of = {value: row for row, value in enumerate(stored_hashes, start)}
        hashes = [caption_hash(caption.text) for caption in captions]
        for value, caption in zip(hashes, captions, strict=True):
            if value not in row_of:
                cached = ", ".join(map(hash_hex, row_of)) or "none"
                text = caption.text if len(caption.text) <= 60 else caption.text[:57] + "..."
                raise ContractError(
                    f"{self.path}: sample {self.key(index)!r}: "
                    f"caption {text!r} (hash {hash_hex(value)}) was not embedded; "
                    f"cached caption hashes: {cached}; `touch` data whose time was kept; {REDO}"
                )
        return [row_of[value] for value in hashes]

    def embeddings(self, rows: Sequence[int]) -> torch.Tensor:
        """(n, W) float32 of these rows, which should be near each other; ContractError for another
        checksum."""
        first, stop = (min(rows), max(rows) + 1) if rows else (0, 0)
        chosen = np.array(rows, dtype=np.int64) - first
        stored_nW = self._read("embeddings", first, stop)[chosen]
        scale_n = self._read("scales", first, stop)[chosen]
        checks = self._read("row_checks", first, stop)[chosen].tolist()
        for number, row_W, scale, check in zip(
            rows, stored_nW, scale_n.tolist(), checks, strict=True
        ):
            if row_check(row_W, scale, number) != check:
                raise ContractError(
                    f"{self.path} is damaged: row {number} has another checksum; {REDO}"
                )
        return torch.from_numpy(stored_nW.astype(np.float32) * scale_n[:, None])

    def verify(self) -> None:
        """Read every byte; raises ContractError if the contents have another SHA-256 than the file
        says."""
        for name, names in (("sha256", TENSORS), ("checks_sha256", CHECKS)):
            digest = tensors_digest({tensor: self[tensor] for tensor in names})
            if digest != self.meta[name]:
                raise ContractError(
                    f"{self.path} is damaged: SHA-256 {digest}, expected {self.meta[name]}; {REDO}"
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
        if expect_fingerprint not in (None, manifest.fingerprint, teacher.earlier().fingerprint):
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
        paths = [str(directory / entry["file"]) for entry in manifest.shards.values()]
        for path, entry, stamp in zip(
            paths, manifest.shards.values(), stamps_of(paths), strict=True
        ):
            if stamp is None:
                raise ContractError(f"{path} is missing, but the manifest lists it; {REDO}")
            if stamp[0] != entry["bytes"]:
                raise ContractError(
                    f"{path} has {stamp[0]} bytes, expected {entry['bytes']}; {REDO}"
                )
        return cls(directory, manifest)

    def __reduce__(self) -> tuple[type[EmbeddingCache], tuple[Path, CacheManifest]]:
        return EmbeddingCache, (self.directory, self.manifest)  # a worker opens the files itself

    def _open_shard(self, name: str) -> ShardFile:
        """A shard's file; raises ContractError if it is missing or differs from the manifest."""
        entry = self.manifest.shards.get(name)
        if entry is None:
            names = list(self.manifest.shards)
            listed = ", ".join(names[:5])
            if len(names) > 5:
                listed += ", ..."
            raise ContractError(f"{self.directory} has no shard {name!r}; known: {listed}; {REDO}")
        path = self.directory / entry["file"]
        try:
            file = ShardFile(path)
        except FileNotFoundError as error:
            raise ContractError(f"{path} is missing, but the manifest lists it; {REDO}") from error
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
        }
        expected |= {"truncated": str(entry["truncated"])}
        if actual["fingerprint"] == self.manifest.earlier_fingerprint:
            # of a shard that was proven later
            expected["fingerprint"] = self.manifest.earlier_fingerprint
        wrong = [
            f"{name} is {actual[name]!r}, not {value!r}"
            for name, value in expected.items()
            if name in actual and actual[name] != value
        ]
        if wrong:
            raise ContractError(f"{path} differs from the manifest: {'; '.join(wrong)}; {REDO}")
        return file

    def rows(
        self, shard_name: str, index_in_shard: int, captions: Sequence[Caption], *, key: str = ""
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
                    f"{shard.size} samples in {source.path}, {file.samples} when it was embedded"
                )
                raise ContractError(f"{file.path}: shard {shard.name!r} has {sizes}; {REDO}")
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
            tracked = track(compared, total=len(shards), label="compare captions", unit="shards")
            try:
                for shard, result in zip(shards, tracked, strict=True):
                    results[shard.name] = result
            finally:
                source.record_digests(results)

    def _unproven(self, source: Source) -> list[Shard]:
        """The shards without a recorded digest that says that the cache has their captions."""
        digests_by_name = source.known_digests()
        entries = self.manifest.shards
        return [
            shard
            for shard in source.shards
            if entries[shard.name]["rows_sha256"] not in digests_by_name.get(shard.name, ())
        ]

    def _compare_shard(self, source: Source, full: bool, shard: Shard) -> tuple[str, str]:
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


def shard_captions(source: Source, shard: Shard) -> tuple[list[str], list[tuple[Caption, ...]]]:
    """Keys and captions of a shard's samples; an unreadable sample has a key and no captions."""
    samples = [source.captions(number) for number in range(shard.start, shard.start + shard.size)]
    return [key for key, _ in samples], [captions for _, captions in samples]


class CacheWriter:
    """Writes the shards of one cache; any number of ranks may write different shards of one
    directory. Raises ContractError if the directory holds another teacher's, or another dtype's,
    embeddings."""

    def __init__(
        self, directory: str | os.PathLike[str], identity: TeacherIdentity, dtype: str = "float16"
    ) -> None:
        if dtype not in CACHE_DTYPES:
            raise ValueError(unknown("cache dtype", dtype, CACHE_DTYPES))
        self.directory = Path(directory)
        self.identity = identity
        self.dtype = dtype
        self._written: list[str] = []
        self._empty = CacheManifest(
            teacher=dict(vars(identity)),
            fingerprint=identity.fingerprint,
            dtype=dtype,
            width=identity.width,
            shards={},
            complete=False,
        )
        path = self.directory / CacheManifest.FILE
        if not path.is_file():
            self._empty.write(path)
            return
        existing = self.manifest()
        self._empty = replace(self._empty, earlier_fingerprint=existing.earlier_fingerprint)
        if existing.fingerprint != identity.fingerprint:
            settings = differences(existing.teacher, identity)
            hashes = f"fingerprint {existing.fingerprint[:12]}, not {identity.fingerprint[:12]}"
            raise ContractError(
                f"{path} belongs to another teacher ({settings}; {hashes}); choose another --cache"
            )
        if existing.dtype != dtype:
            raise ContractError(
                f"{path} has dtype {existing.dtype}, not {dtype}; choose another --cache or --dtype"
            )

    def manifest(self) -> CacheManifest:
        """The directory's, as it is now."""
        return CacheManifest.read(self.directory / CacheManifest.FILE)

    def path(self, shard: str) -> Path:
        """The file of a shard."""
        return self.directory / shard_file(shard)

    def is_complete(self, shard: str, digest: str) -> bool:
        """Whether the shard's file exists, is intact, and has this teacher and the rows of this
        digest. Reads every byte, and logs a warning if the file is damaged."""
        try:
            file = ShardFile(self.path(shard))
            fingerprints = (self.identity.fingerprint, self._empty.earlier_fingerprint)
            same_teacher = file.meta["fingerprint"] in fingerprints
            same_rows = file.meta["rows_sha256"] == digest
            if same_teacher and same_rows and file.meta["dtype"] == self.dtype:
                file.verify()
                return True
        except FileNotFoundError:
            pass
        except ContractError as error:
            log.warning("%s", error)
        return False

    def refuse_loss(self, shard: str, rows: Sequence[tuple[int, int]], read: str) -> None:
        """ContractError if the shard's file has more captions than ``rows``, or none of them; not
        if it is damaged."""
        try:
            file = ShardFile(self.path(shard))
            cached = set(file["caption_hashes"].tolist())
        except (FileNotFoundError, ContractError):
            return
        common = len(cached.intersection(value for _, value in rows))
        if len(rows) < file.captions or (cached and not common):
            raise ContractError(
                f"{file.path} has {file.captions} captions; "
                f"{read} gives {len(rows)} for shard {shard!r}, {common} of them the same; "
                "correct --fields or the data, choose another --cache, "
                "or replace them with --overwrite"
            )

    def write_shard(
        self,
        shard: str,
        keys: Sequence[str],
        rows: Sequence[tuple[int, int]],
        embeddings: torch.Tensor,
        *,
        truncated: int = 0,
    ) -> None:
        """Write one shard; its file appears only when complete.

        shard: name, as the source gives it; keys: of its N samples; rows: R pairs (sample index,
        caption hash) in order of sample; embeddings: (R, W) float; truncated: captions that were
        longer than the teacher's maximum. Raises ValueError for a wrong shape or a non-finite row,
        ContractError if int8 loses too much.
        """
        embeddings = embeddings.float()
        shape = (len(rows), self.identity.width)
        indices = [index for index, _ in rows]
        if embeddings.shape != shape:
            raise ValueError(
                f"shard {shard}: embeddings of shape {tuple(embeddings.shape)}, expected {shape}"
            )
        in_order = indices == sorted(indices)
        in_range = not indices or 0 <= indices[0] <= indices[-1] < len(keys)
        if not in_order or not in_range:
            raise ValueError(
                f"shard {shard}: rows must be in order of sample, with indices under {len(keys)}"
            )
        finite = torch.isfinite(embeddings).all(dim=1)
        if not bool(finite.all()):
            worst = int((~finite).nonzero()[0])
            key = keys[indices[worst]]
            raise ValueError(f"shard {shard}: the embedding of a caption of {key!r} is not finite")
        stored, scales = _quantize(embeddings, self.dtype, shard)
        encoded = [key.encode() for key in keys]
        values = stored.numpy()
        tensors = {
            "embeddings": values,
            "scales": scales.numpy(),
            "row_starts": np.searchsorted(indices, np.arange(len(keys) + 1)).astype(np.int64),
            "caption_hashes": np.array([value for _, value in rows], dtype=np.int64),
            "keys": np.frombuffer(b"".join(encoded), dtype=np.uint8),
            "key_starts": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        }
        scaled_rows = enumerate(zip(values, scales.tolist(), strict=True))
        row_checks = [row_check(row, scale, number) for number, (row, scale) in scaled_rows]
        checks = {"row_checks": np.array(row_checks, dtype=np.int64)}
        metadata = {  # as one entry: safetensors writes entries in random order
            "shard": shard,
            "fingerprint": self.identity.fingerprint,
            "dtype": self.dtype,
            "rows_sha256": rows_digest(keys, rows),
            "sha256": tensors_digest(tensors),
            "checks_sha256": tensors_digest(checks),
            "truncated": str(truncated),
        }
        with atomic_file(self.path(shard)) as temporary:
            save_file(tensors | checks, str(temporary), metadata={META: canonical_json(metadata)})
        self._written.append(shard)
        tell_job(PROGRESS)

    def finish(self, shards: Sequence[str] | None = None) -> CacheManifest | None:
        """Write and return the complete manifest if every one of ``shards``, by default those
        written, exists, else None. Shards that it listed before stay in it, so the splits of a data
        set can share a directory."""
        path = self.directory / CacheManifest.FILE
        entries: dict[str, dict[str, object]] = {
            name: entry
            for name, entry in self.manifest().shards.items()
            if self.path(name).is_file()
        }
        for shard in self._written if shards is None else shards:
            if not self.path(shard).is_file():
                return None
            file = ShardFile(self.path(shard))
            entries[shard] = {
                "file": shard_file(shard),
                "samples": file.samples,
                "captions": file.captions,
                "truncated": int(file.meta["truncated"]),
                "rows_sha256": file.meta["rows_sha256"],
                "sha256": file.meta["sha256"],
                "bytes": file.size,
            }
        manifest = replace(self._empty, shards=entries, complete=True)
        manifest.write(path)
        return manifest


def _quantize(
    embeddings: torch.Tensor, dtype: str, shard: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, W) float32 -> stored rows (R, W) in ``dtype`` and scales (R,) float32, row x scale being
    the embedding. Raises ContractError for int8 where a few huge dimensions would round the others
    away."""
    largest = embeddings.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    if dtype == "float16":
        scales = torch.exp2(torch.ceil(torch.log2(largest / FLOAT16_SAFE)).clamp_min(0.0))
        return (embeddings / scales[:, None]).to(torch.float16), scales
    scales = largest / 127.0
    stored = (embeddings / scales[:, None]).round_().to(torch.int8)
    cosine = torch.nn.functional.cosine_similarity(embeddings, stored.float(), dim=1)
    cosine = cosine[embeddings.any(dim=1)]  # not of rows of zeros
    if len(cosine) and float(cosine.min()) < INT8_COSINE:
        raise ContractError(
            f"shard {shard}: the cosine similarity of an embedding and its int8 form is "
            f"{float(cosine.min()):.5f}, lower than {INT8_COSINE}; use --dtype float16"
        )
    return stored, scales


def shard_bytes(samples: int, captions: int, width: int, dtype: str, *, key_bytes: int) -> int:
    """Bytes of a cache's tensors: a caption has a row, its scale (4), its hash and its checksum (8
    each), a sample a key of ``key_bytes``, and the starts of its key and of its rows (8 each)."""
    return captions * (width * VALUE_BYTES[dtype] + 20) + samples * (key_bytes + 16)


def differences(stored: Mapping[str, object], yours: TeacherIdentity) -> str:
    """The settings that differ between two teachers, with both values."""
    ignored = {"adapter"}  # adapter_sha256 says which one it is
    if yours.is_earlier or not stored.get("config_sha256"):
        ignored |= {"config_sha256", "tokenizer_sha256"}  # which one of them does not know
    settings = [
        f"{name} {stored.get(name)!r} != {value!r}"
        for name, value in vars(yours).items()
        if stored.get(name) != value and name not in ignored
    ]
    return "; ".join(settings) or "the same settings"


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
