"""The embedding cache: one safetensors file per shard, and a manifest that names the teacher.

```
<directory>/manifest.json             CacheManifest; complete = false until embedding has finished
<directory>/<shard name>.safetensors  the rows of one shard
```

Tensors of a shard with N samples and R captions (blank captions have no row, equal captions of one sample share one):

| name           | shape  | dtype        | meaning                                                      |
|----------------|--------|--------------|--------------------------------------------------------------|
| embeddings     | (R, W) | float16/int8 | embedding = row x scale                                      |
| scales         | (R,)   | float32      | 1 for float16 rows that fit, else a power of two; int8: max/127 |
| row_starts     | (N+1,) | int64        | sample i owns the rows row_starts[i] .. row_starts[i+1]      |
| caption_hashes | (R,)   | int64        | first 64 bits of the caption's SHA-256                       |
| keys           | (K,)   | uint8        | the sample keys, UTF-8, one after the other                  |
| key_starts     | (N+1,) | int64        | where each key starts                                        |
| row_checks     | (R,)   | int64        | CRC-32 of number, scale and row; compared at every read   |
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from llm2clip_plugin.contracts import (
    CACHE_DTYPES,
    VALUE_BYTES,
    CacheManifest,
    TeacherIdentity,
    atomic_file,
    canonical_json,
    sha256_text,
    shard_file,
)
from llm2clip_plugin.data.cache_proof import check_captions
from llm2clip_plugin.data.cache_shard import META, REDO, ShardFile, row_check, rows_digest, tensors_digest
from llm2clip_plugin.data.index import stamps_of
from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.files import PROGRESS, ContractError, tell_job
from llm2clip_plugin.options import unknown

log = logging.getLogger(__name__)

OPEN_SHARDS = 64  # files that one process keeps open
FEW_SHARDS = 16  # shards whose headers are read at every start
ENTRY = ("file", "samples", "captions", "truncated", "rows_sha256", "sha256")  # of a shard in the manifest
INT8_COSINE = 0.999  # lowest cosine similarity allowed between a row and its int8 form
FLOAT16_SAFE = 32768.0  # larger rows are stored halved until they fit (float16 ends at 65504)


class EmbeddingCache:
    """A complete cache, opened for reading. The files of the last shards used stay open."""

    def __init__(self, directory: Path, manifest: CacheManifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._files: OrderedDict[str, ShardFile] = OrderedDict()  # last used last

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        expect_fingerprint: str | None = None,
        expect_width: int | None = None,
    ) -> EmbeddingCache:
        """Open a cache.

        Raises FileNotFoundError if there is none, ContractError if its teacher or width differs, it is incomplete,
        or a shard is missing or truncated; the message has both values.
        """
        directory = Path(directory)
        path = directory / CacheManifest.FILE
        manifest = CacheManifest.read(path)
        _check_manifest(manifest, path)
        if expect_fingerprint is not None and manifest.fingerprint != expect_fingerprint:
            raise ContractError(
                f"{directory} contains embeddings of {manifest.teacher['llm']} with fingerprint "
                f"{manifest.fingerprint}, expected fingerprint {expect_fingerprint}; "
                "embed with the expected LLM, or use its cache"
            )
        if expect_width is not None and manifest.width != expect_width:
            raise ContractError(
                f"{directory} contains embeddings of width {manifest.width} ({manifest.teacher['llm']}), expected "
                f"{expect_width}; use the cache of the LLM that the text adapter was made for"
            )
        cache = cls(directory, manifest)
        cache._check_files()
        return cache

    @property
    def width(self) -> int:
        """Width W of an embedding."""
        return self.manifest.width

    @property
    def teacher(self) -> TeacherIdentity:
        """The teacher that the embeddings come from."""
        return TeacherIdentity(**self.manifest.teacher)

    @property
    def fingerprint(self) -> str:
        """Of the teacher."""
        return self.manifest.fingerprint

    def __getstate__(self) -> dict[str, object]:
        # a worker opens the files itself
        return {"directory": self.directory, "manifest": self.manifest, "_files": OrderedDict()}

    def _check_files(self) -> None:
        """Raise ContractError for a file that is missing or has another size than the manifest says.

        The headers of few files, and of those without a recorded size, are compared too; the others' when they are
        first read (``shard``).
        """
        entries = self.manifest.shards
        stamps = stamps_of([str(self.directory / entry["file"]) for entry in entries.values()])
        for (name, entry), stamp in zip(entries.items(), stamps, strict=True):
            path = self.directory / entry["file"]
            if stamp is None:
                raise ContractError(f"{path} is missing, but the manifest lists shard {name!r}; {REDO}")
            if len(entries) <= FEW_SHARDS or "bytes" not in entry:
                self.shard(name)
            elif stamp[0] != entry["bytes"]:
                raise ContractError(f"{path} has {stamp[0]} bytes, expected {entry['bytes']}; {REDO}")

    def shard(self, name: str) -> ShardFile:
        """A shard's file; raises ContractError if it is missing or differs from the manifest."""
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        entry = self.manifest.shards.get(name)
        if entry is None:
            known = ", ".join([*self.manifest.shards][:5]) + ", ..." * (len(self.manifest.shards) > 5)
            raise ContractError(f"{self.directory} has no shard {name!r}; known: {known}; {REDO}")
        path = self.directory / entry["file"]
        try:
            file = ShardFile(path)
        except FileNotFoundError as error:
            raise ContractError(f"{path} is missing, but the manifest lists shard {name!r}; {REDO}") from error
        actual = {"width": file.width, "samples": file.samples, "captions": file.captions, **file.meta}
        expected = {"fingerprint": self.fingerprint, "width": self.width, "dtype": self.manifest.dtype, **entry}
        expected |= {"truncated": str(entry["truncated"])}
        if wrong := [name for name, value in expected.items() if name in actual and actual[name] != value]:
            both = "; ".join(f"{name} is {actual[name]!r}, not {expected[name]!r}" for name in wrong)
            raise ContractError(f"{path} differs from the manifest: {both}; {REDO}")
        self._files[name] = file
        if len(self._files) > OPEN_SHARDS:
            self._files.popitem(last=False)
        return file

    def rows(self, shard_name: str, index_in_shard: int, captions: Sequence[Caption], *, key: str = "") -> torch.Tensor:
        """(len(captions), W) float32: the embeddings of a sample's captions, in the captions' order.

        key: the sample's key, compared with the cache's unless "". Raises ContractError if the key or a caption is not
        the one that was embedded.
        """
        file = self.shard(shard_name)
        return file.embeddings(file.row_numbers(index_in_shard, captions, key))

    def check(self, source: Source, *, full: bool = False) -> None:
        """Compare the cache with a source: shard names, counts, keys and the hash of every caption.

        The captions are read where digests don't show that they are the cache's, or everywhere with ``full``. Raises
        ContractError at the first difference, with both values.
        """
        check_captions(source, self.manifest.shards, self.shard, full=full)

    def verify(self) -> None:
        """Read every byte and compare each shard's SHA-256 with the manifest's. Raises ContractError."""
        for name in self.manifest.shards:
            file = self.shard(name)
            if damage := file.damage():
                raise ContractError(f"{file.path} is damaged: {damage}; {REDO}")


def _check_manifest(manifest: CacheManifest, path: Path) -> None:
    """ContractError unless a manifest is complete and agrees with itself."""
    if not manifest.complete:
        raise ContractError(f"{path} is incomplete: embedding has not finished; {REDO}")
    for name, entry in manifest.shards.items():
        if missing := [value for value in ENTRY if value not in entry]:
            raise ContractError(f"{path}: the entry of shard {name!r} is missing {', '.join(missing)}; {REDO}")
        if os.path.isabs(entry["file"]) or os.path.normpath(entry["file"]).startswith(".."):
            raise ContractError(f"{path}: the file of shard {name!r}, {entry['file']!r}, is outside the cache")
    if manifest.dtype not in CACHE_DTYPES:
        raise ContractError(f"{path} has unknown dtype {manifest.dtype!r}; known: {', '.join(CACHE_DTYPES)}")
    try:
        teacher = TeacherIdentity(**manifest.teacher)
    except TypeError as error:
        raise ContractError(f"{path}: its teacher has unknown or missing settings ({error}); {REDO}") from error
    if teacher.fingerprint != manifest.fingerprint or teacher.width != manifest.width:
        raise ContractError(
            f"{path} was edited: it has fingerprint {manifest.fingerprint} and width {manifest.width}, its teacher's "
            f"settings give {teacher.fingerprint} and {teacher.width}; {REDO}"
        )


class CacheWriter:
    """Writes the shards of one cache; any number of ranks may write different shards of one directory.

    Raises ContractError if the directory holds another teacher's, or another dtype's, embeddings.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: TeacherIdentity, dtype: str = "float16") -> None:
        if dtype not in CACHE_DTYPES:
            raise ValueError(unknown("cache dtype", dtype, CACHE_DTYPES))
        self.directory = Path(directory)
        self.identity = identity
        self.dtype = dtype
        self._written: list[str] = []
        path = self.directory / CacheManifest.FILE
        if not path.is_file():
            self._manifest({}, complete=False).write(path)
            return
        existing = self.manifest()
        if existing.fingerprint != identity.fingerprint:
            raise ContractError(
                f"{path} belongs to another teacher ({differences(existing.teacher, identity)}; fingerprint "
                f"{existing.fingerprint[:12]}, not {identity.fingerprint[:12]}); choose another --cache"
            )
        if existing.dtype != dtype:
            raise ContractError(
                f"{path} has dtype {existing.dtype}, not {dtype}; choose another --cache, or use --dtype "
                f"{existing.dtype}"
            )

    def manifest(self) -> CacheManifest:
        """The directory's, as it is now."""
        return CacheManifest.read(self.directory / CacheManifest.FILE)

    def _manifest(self, shards: dict[str, dict[str, object]], *, complete: bool) -> CacheManifest:
        return CacheManifest(
            teacher=dict(vars(self.identity)),
            fingerprint=self.identity.fingerprint,
            dtype=self.dtype,
            width=self.identity.width,
            shards=shards,
            complete=complete,
        )

    def path(self, shard: str) -> Path:
        """The file of a shard."""
        return self.directory / shard_file(shard)

    def is_complete(self, shard: str, digest: str) -> bool:
        """Whether the shard's file exists, is intact, and has this teacher and the rows of this digest.

        Reads every byte, and logs a warning if the file is damaged.
        """
        path = self.path(shard)
        try:
            file = ShardFile(path)
        except FileNotFoundError:
            return False
        except ContractError as error:
            log.warning("%s", error)
            return False
        found = (file.meta["fingerprint"], file.meta["dtype"], file.meta["rows_sha256"])
        if found != (self.identity.fingerprint, self.dtype, digest):
            return False
        if damage := file.damage():
            log.warning("%s is damaged: %s; its captions are embedded again", path, damage)
        return not damage

    def refuse_loss(self, shard: str, rows: Sequence[tuple[int, int]], read: str) -> None:
        """ContractError if the shard's file has more captions than ``rows``, or none of them; ``read``: from where.

        A damaged file may be replaced by anything.
        """
        try:
            file = ShardFile(self.path(shard))
            cached = set(file["caption_hashes"].tolist())
        except (FileNotFoundError, ContractError):
            return
        common = len(cached.intersection(value for _, value in rows))
        if len(rows) < file.captions or (cached and not common):
            raise ContractError(
                f"{file.path} has {file.captions} captions; {read} gives {len(rows)} for shard {shard!r}, {common} of "
                "them the same. Correct --fields or the data, choose another --cache, or replace them with --overwrite"
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

        shard: name, as the source gives it; keys: of its N samples; rows: R pairs (sample index, caption hash) in order
        of sample; embeddings: (R, W) float; truncated: captions that were longer than the teacher's maximum.
        Raises ValueError for a wrong shape or a non-finite row, ContractError if int8 loses too much.
        """
        embeddings = embeddings.float()
        shape, expected = tuple(embeddings.shape), (len(rows), self.identity.width)
        if shape != expected:
            raise ValueError(f"shard {shard}: embeddings of shape {shape}, expected {expected}")
        indices = [index for index, _ in rows]
        if indices != sorted(indices) or (indices and not 0 <= indices[0] <= indices[-1] < len(keys)):
            raise ValueError(f"shard {shard}: rows must be in order of sample, with indices under {len(keys)}")
        finite = torch.isfinite(embeddings).all(dim=1)
        if not bool(finite.all()):
            worst = int((~finite).nonzero()[0])
            raise ValueError(f"shard {shard}: the embedding of a caption of {keys[indices[worst]]!r} is not finite")
        stored, scales = quantize(embeddings, self.dtype)
        self._refuse_inaccurate(shard, embeddings, stored)
        encoded, values = [key.encode() for key in keys], stored.numpy()
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

    def _refuse_inaccurate(self, shard: str, embeddings: torch.Tensor, stored: torch.Tensor) -> None:
        """ContractError for int8 where a few huge dimensions would round the others away."""
        if self.dtype != "int8" or not len(embeddings):
            return
        cosine = torch.nn.functional.cosine_similarity(embeddings, stored.float(), dim=1)
        cosine = cosine[embeddings.abs().amax(dim=1) > 0]
        if len(cosine) and float(cosine.min()) < INT8_COSINE:
            raise ContractError(
                f"shard {shard}: the cosine similarity of an embedding and its int8 form is {float(cosine.min()):.5f}, "
                f"lower than {INT8_COSINE}; use --dtype float16"
            )

    def finish(self, shards: Sequence[str] | None = None) -> CacheManifest | None:
        """Write and return the complete manifest if every shard exists; None while other ranks still write.

        shards: the names that must exist; by default those that this writer wrote. Shards that the manifest listed
        before stay in it, so the splits of a data set can share a directory.
        """
        path = self.directory / CacheManifest.FILE
        entries: dict[str, dict[str, object]] = {
            name: entry for name, entry in self.manifest().shards.items() if self.path(name).is_file()
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
        manifest = self._manifest(entries, complete=True)
        manifest.write(path)
        return manifest


def quantize(embeddings: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, W) float32 -> stored rows (R, W) in ``dtype`` and scales (R,) float32, row x scale being the embedding."""
    largest = embeddings.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    if dtype == "int8":
        scales = largest / 127.0
        return (embeddings / scales[:, None]).round_().to(torch.int8), scales
    scales = torch.exp2(torch.ceil(torch.log2(largest / FLOAT16_SAFE)).clamp_min(0.0))
    return (embeddings / scales[:, None]).to(torch.float16), scales


def shard_bytes(samples: int, captions: int, width: int, dtype: str, *, key_bytes: int) -> int:
    """Bytes of a cache's tensors.

    A caption has a row, its scale (4), its hash and its checksum (8 each); a sample has a key of ``key_bytes``, and the
    starts of its key and of its rows (8 each).
    """
    return captions * (width * VALUE_BYTES[dtype] + 20) + samples * (key_bytes + 16)


def differences(stored: Mapping[str, object], yours: TeacherIdentity) -> str:
    """The settings that differ between two teachers, with both values."""
    settings = [
        f"{name} {stored.get(name)!r} != {value!r}"
        for name, value in vars(yours).items()
        if stored.get(name) != value and name != "adapter"  # adapter_sha256 says which one it is
    ]
    return "; ".join(settings) or "the same settings"


def source_digest(source: Source) -> str:
    """``3318333 samples in 332 shards (1f0c...)``: over the shards' names and numbers of samples."""
    shards = [(shard.name, shard.size) for shard in source.shards]
    return f"{len(source)} samples in {len(shards)} shards ({short_digest(shards)})"


def cache_digest(cache: EmbeddingCache) -> str:
    """``6636666 captions (1f0c...)``: over the manifest, which has a hash of each shard's rows."""
    manifest = cache.manifest
    shards = {  # caches of older versions have no "bytes"
        name: {key: value for key, value in entry.items() if key != "bytes"} for name, entry in manifest.shards.items()
    }
    return f"{manifest.captions} captions ({short_digest([manifest.fingerprint, manifest.dtype, shards])})"


def short_digest(value: object) -> str:
    """The first digits of a JSON value's SHA-256."""
    return sha256_text(canonical_json(value))[:12]
