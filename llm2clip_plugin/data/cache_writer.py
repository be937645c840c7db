"""Writes an embedding cache: a shard at a time, as float16 or int8, and at the end the manifest."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from llm2clip_plugin.atomic import atomic_file
from llm2clip_plugin.contracts import (
    CACHE_DTYPES,
    CacheManifest,
    TeacherIdentity,
    shard_file,
)
from llm2clip_plugin.data.cache import differences
from llm2clip_plugin.data.cache_file import (
    META,
    ShardFile,
    row_check,
    rows_digest,
    tensors_digest,
)
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hashes import canonical_json
from llm2clip_plugin.options import unknown
from llm2clip_plugin.run_folder import PROGRESS, tell_job

log = logging.getLogger(__name__)

INT8_COSINE = 0.999  # lowest cosine similarity allowed between a row and its int8 form
# larger rows are stored halved until they fit (float16 ends at 65504)
FLOAT16_SAFE = 32768.0


class CacheWriter:
    """Writes the shards of one cache; any number of ranks may write different shards of one
    directory. Raises ContractError if the directory holds another teacher's, or another dtype's,
    embeddings."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        identity: TeacherIdentity,
        dtype: str = "float16",
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
        self._empty = replace(
            self._empty, earlier_fingerprint=existing.earlier_fingerprint
        )
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

    def refuse_loss(
        self, shard: str, rows: Sequence[tuple[int, int]], read: str
    ) -> None:
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
                "correct --fields or the data, choose another --cache, or replace them: "
                f"`llm2clip embed ... --overwrite`, or delete {file.path.parent}"
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
        indices = [index for index, _ in rows]
        self._check_rows(shard, keys, indices, embeddings)
        stored, scales = _quantize(embeddings, self.dtype, shard)
        values = stored.numpy()
        row_starts = np.searchsorted(indices, np.arange(len(keys) + 1))
        hashes = [value for _, value in rows]
        encoded = [key.encode() for key in keys]
        tensors = {
            "embeddings": values,
            "scales": scales.numpy(),
            "row_starts": row_starts.astype(np.int64),
            "caption_hashes": np.array(hashes, dtype=np.int64),
            "keys": np.frombuffer(b"".join(encoded), dtype=np.uint8),
            "key_starts": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        }
        row_checks: list[int] = []
        for row, scale in zip(values, scales.tolist(), strict=True):
            row_checks.append(row_check(row, scale, len(row_checks)))
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
            save_file(
                tensors | checks,
                str(temporary),
                metadata={META: canonical_json(metadata)},
            )
        self._written.append(shard)
        tell_job(PROGRESS)

    def _check_rows(
        self,
        shard: str,
        keys: Sequence[str],
        indices: Sequence[int],
        embeddings: torch.Tensor,
    ) -> None:
        """ValueError unless there is a finite embedding for each of the rows, whose samples'
        ``indices`` are in order and have keys."""
        shape = (len(indices), self.identity.width)
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
            raise ValueError(
                f"shard {shard}: the embedding of a caption of {key!r} is not finite"
            )

    def finish(self, shards: Sequence[str] | None = None) -> CacheManifest | None:
        """Write and return the complete manifest if every one of ``shards``, by default those
        written, exists, else None. Shards that it listed before stay in it, so the splits of a data
        set can share a directory."""
        entries: dict[str, dict[str, object]] = {}
        for name, entry in self.manifest().shards.items():
            if self.path(name).is_file():
                entries[name] = entry
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
        manifest.write(self.directory / CacheManifest.FILE)
        return manifest


def _quantize(
    embeddings: torch.Tensor, dtype: str, shard: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, W) float32 -> stored rows (R, W) in ``dtype`` and scales (R,) float32, row x scale being
    the embedding. Raises ContractError for int8 where a few huge dimensions would round the others
    away."""
    largest = embeddings.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    if dtype == "float16":
        halvings = torch.ceil(torch.log2(largest / FLOAT16_SAFE)).clamp_min(0.0)
        scales = torch.exp2(halvings)
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
